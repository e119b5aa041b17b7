"""Ways to compute rows in processes of their own: compiled side by side, then timed one by one.

A compiler works on one core for a minute and more, and leaves a process slower than it found it. A
process measures its row with one way alone: it says that it is ready once that is compiled, waits
for a line on its standard input, measures, and answers with the record.
"""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TextIO

import torch

from .timing import Call
from .turns import record_of

READY = "ready"
# Seconds to wait where there is too little memory; after the last the row goes without.
PAUSES = (10, 20, 30, 0)


class WaitingTimer:
    """A timer that measures when it is told to."""

    def __init__(self, timer: Any, answers: TextIO) -> None:
        self.timer, self.answers, self.device = timer, answers, timer.device
        self.told = False

    def times(self, call: Call) -> list[float]:
        if not self.told:
            self._wait(call)
        return self.timer.times(call)

    def _wait(self, call: Call) -> None:
        # What is new is compiled now, or captured.
        for _ in range(3):
            call()
        if self.device == "cuda":
            # The others need the memory as well.
            torch.cuda.empty_cache()
        print(READY, file=self.answers)
        sys.stdin.readline()
        self.told = True

    def peak_bytes(self, call: Call) -> int | None:
        return self.timer.peak_bytes(call)


def answer(way: str, row: Any, measure: Callable[[Any], dict], answers: TextIO) -> None:
    """The child's part: measures `row` with one way alone, and prints the record."""
    alone = replace(row, attentions=(way,), skipped={}, goals=())
    for pause in PAUSES:
        record = measure(alone)
        if "out_of_memory" not in record.get("attentions", {}).get(way, {}):
            break
        # Others that compile beside it have the memory for a while.
        time.sleep(pause)
    print(json.dumps(record), file=answers)


def own_output() -> TextIO:
    """Standard output, of which nothing else that prints has a part from now on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def measure_apart(rows: Sequence[Any], args: Namespace) -> Iterator[tuple[Any, dict]]:
    """Each row with its record; as many rows at a time as `args.processes` have ways."""
    group: list[Any] = []
    for row in rows:
        if group and sum(len(other.attentions) for other in (*group, row)) > args.processes:
            yield from _measure_group(group, args)
            group = []
        group.append(row)
    if group:
        yield from _measure_group(group, args)


def _measure_group(rows: Sequence[Any], args: Namespace) -> Iterator[tuple[Any, dict]]:
    children = {(row.name, way): _start(row, way, args) for row in rows for way in row.attentions}
    try:
        # All are compiled before the first is timed.
        first = {key: child.stdout.readline() for key, child in children.items()}
        for row in rows:
            outcomes: dict[str, dict] = {way: {"skipped": why} for way, why in row.skipped.items()}
            missing = None
            for way in row.attentions:
                child = children[row.name, way]
                record = _record(child, first[row.name, way])
                # Before it is gone, its memory is not free for the next.
                reason = record.get("reason", f"its process ended with status {child.wait()}")
                outcomes[way] = record.get("attentions", {}).get(way, {"failed": reason})
                missing = missing or record.get("missing_reference")
            yield row, record_of(row, outcomes, missing)
    finally:
        for child in children.values():
            child.kill()


def _record(child: Any, line: str) -> dict:
    """What a process answers whose first line is this one."""
    if line.strip() == READY:
        child.stdin.write("\n")
        child.stdin.flush()
        line = child.stdout.readline()
    return json.loads(line) if line else {}


def _start(row: Any, way: str, args: Namespace) -> Any:
    options = ("--device", args.device, "--seconds", str(args.seconds))
    command = (sys.executable, "-m", args.name, "--only", row.name, "--way", way, *options)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
