"""Ways to compute rows in processes of their own: compiled side by side, timed one by one.

A compiler works on one core for a minute and more, and leaves a process slower than it found it. A
process measures its row with one way alone: it says that it is ready once that is compiled, waits
for a line on its standard input, and measures; so it does `TURNS` times, in turns with the other
ways, and answers with the record. A machine that is slower for some seconds is so for all of them.
Rows are spread over all GPUs, but timed one at a time: the CPU is theirs in common.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TextIO

import torch

from .timing import Call
from .turns import record_of

READY = "ready"
TURNS = 4
# Seconds to wait where there is too little memory; after the last the row goes without.
PAUSES = (10, 20, 30, 0)
# Seconds after which a process that is halted has nothing left to do on the GPU.
SETTLED = 1.0


class WaitingTimer:
    """A timer that measures in turns with other processes, when it is told to."""

    def __init__(self, timer: Any, answers: TextIO) -> None:
        self.timer, self.answers, self.device = timer, answers, timer.device

    def times(self, call: Call) -> list[float]:
        # What is new is compiled now, or captured.
        for _ in range(3):
            call()
        times = []
        for _ in range(TURNS):
            self._wait()
            times += self.timer.times(call)
        return times

    def _wait(self) -> None:
        if self.device == "cuda":
            # The others need the memory as well.
            torch.cuda.empty_cache()
        print(READY, file=self.answers)
        sys.stdin.readline()

    def peak_bytes(self, call: Call) -> int | None:
        return self.timer.peak_bytes(call)


def answer(way: str, row: Any, measure: Callable[[Any], dict], answers: TextIO) -> None:
    """The child's part: measures `row` with one way alone, and prints the record."""
    part = replace(row, attentions=(way,), skipped={}, goals=())
    for pause in PAUSES:
        record = measure(part)
        if "out_of_memory" not in record.get("attentions", {}).get(way, {}):
            break
        # Others that compile beside it have the memory for a while.
        time.sleep(pause)
    print(json.dumps(record), file=answers, flush=True)


def alone() -> TextIO:
    """For a child: its standard output, of which nothing else that prints has a part from now on.

    It and what it starts become a group of processes, which signals can be sent to.
    """
    os.setpgrp()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def measure_apart(rows: Sequence[Any], args: Namespace) -> Iterator[tuple[Any, dict]]:
    """Each row with its record, once all its ways are ready, in whichever order.

    As many rows are under way as `args.processes` have ways. Those that still compile are halted
    while another is timed.
    """
    waiting, started = deque(rows), deque[_Started]()
    gpus = _gpus(args.device)
    try:
        while waiting or started:
            busy = sum(len(row.children) for row in started)
            while waiting and (not busy or busy + len(waiting[0].attentions) <= args.processes):
                gpu = min(gpus, key=lambda gpu: sum(row.gpu == gpu for row in started))
                started.append(_Started(waiting.popleft(), args, gpu))
                busy += len(started[-1].children)
            ready = _first_ready(started)
            with _halted([row for row in started if row is not ready]):
                record = ready.measure()
            started.remove(ready)
            yield ready.row, record
    finally:
        for row in started:
            row.send(signal.SIGKILL)


class _Started:
    """A row whose ways have a process each, all on one GPU."""

    def __init__(self, row: Any, args: Namespace, gpu: str | None) -> None:
        self.row, self.gpu = row, gpu
        self.children = {way: _start(row, way, args, gpu) for way in row.attentions}
        # The last line of each.
        self.said: dict[str, str] = {}

    def measure(self) -> dict:
        """The record of a row whose ways are all ready."""
        while ready := [way for way in self.children if self.said[way].strip() == READY]:
            for way in ready:
                self.said[way] = _next(self.children[way])
        row = self.row
        outcomes: dict[str, dict] = {way: {"skipped": why} for way, why in row.skipped.items()}
        missing = None
        for way, child in self.children.items():
            record = json.loads(self.said[way] or "{}")
            reason = record.get("reason", f"its process ended with status {child.wait()}")
            outcomes[way] = record.get("attentions", {}).get(way, {"failed": reason})
            missing = missing or record.get("missing_reference")
        return record_of(row, outcomes, missing)

    def send(self, number: int) -> None:
        """A signal to all processes, with those that compile for them."""
        for child in self.children.values():
            try:
                os.killpg(child.pid, number)
            except ProcessLookupError:
                # It has not come to `alone`.
                child.send_signal(number)


def _first_ready(started: Iterable[_Started]) -> _Started:
    """The first row of which every process has said something."""
    with selectors.DefaultSelector() as selector:
        for row in started:
            for way, child in row.children.items():
                if way not in row.said:
                    selector.register(child.stdout, selectors.EVENT_READ, (row, way))
        while True:
            for row in started:
                if len(row.said) == len(row.children):
                    return row
            for key, _ in selector.select():
                row, way = key.data
                row.said[way] = row.children[way].stdout.readline()
                selector.unregister(key.fileobj)


@contextmanager
def _halted(started: Sequence[_Started]) -> Iterator[None]:
    """Leaves CPU and GPU to another row."""
    for row in started:
        row.send(signal.SIGSTOP)
    try:
        if started:
            # What they have launched is over then.
            time.sleep(SETTLED)
        yield
    finally:
        for row in started:
            row.send(signal.SIGCONT)


def _next(child: Any) -> str:
    """Has a process that is ready take its turn; what it says after that, nothing if it is gone."""
    try:
        child.stdin.write("\n")
        child.stdin.flush()
    except BrokenPipeError:
        return ""
    return child.stdout.readline()


def _gpus(device: str) -> list[str | None]:
    """How CUDA is told of each GPU that is visible."""
    if device != "cuda":
        return [None]
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*(named.split(",")[:count] if named else map(str, range(count)))]


def _start(row: Any, way: str, args: Namespace, gpu: str | None) -> Any:
    options = ("--device", args.device, "--seconds", str(args.seconds))
    command = (sys.executable, "-m", args.name, "--only", row.name, "--way", way, *options)
    visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | visible)
