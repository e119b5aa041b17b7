"""Ways in processes of their own make the record that one process would make."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks import apart, command
from benchmarks.apart import measure_apart
from benchmarks.unet.goals import Goal
from benchmarks.unet.rows import TINY_ROWS, select


def test_each_way_has_a_process(capfd):
    (row,) = select(TINY_ROWS, ["eager/tiny/64"])
    args = argparse.Namespace(name="benchmarks.unet", device="cpu", seconds=0.0)
    goals = (Goal("official", "nothing", 1.0),)
    row = replace(row, attentions=("official", "nothing"), skipped={"sdpa": "slow"}, goals=goals)
    ((_, record),) = measure_apart([row], args)
    assert record["case"]["attentions"] == ("official", "nothing")
    official, nothing, skipped = (record["attentions"][n] for n in ("official", "nothing", "sdpa"))
    assert 0 < official["ms_20"] <= official["ms"] <= official["ms_80"]
    assert official["errors"]["official"] == 0
    # It says why, beside what it printed itself.
    assert nothing == {"failed": "KeyError: 'nothing'"}
    assert "Traceback" in capfd.readouterr().err
    assert skipped == {"skipped": "slow"}
    assert record["status"] == "failed" and "nothing" in record["reason"]
    assert record["goals"][0]["over"] is None


def test_a_process_that_dies_is_a_failure():
    (row,) = select(TINY_ROWS, ["eager/tiny/64"])
    args = argparse.Namespace(name="benchmarks.nowhere", device="cpu", seconds=0.0)
    row = replace(row, attentions=("official",), goals=())
    ((_, record),) = measure_apart([row], args)
    assert record["attentions"]["official"] == {"failed": "its process ended with status 1"}
    assert record["status"] == "failed"


class Child:
    """Stands for a process: what it says lies in a pipe, and what is done to it in `log`."""

    log: ClassVar[list] = []

    def __init__(self, row, way, args, gpu):
        self.row, self.way, self.stdin = row, way, self
        reading, self.writing = os.pipe()
        self.stdout = os.fdopen(reading)
        self.log.append(("start", row.name) if gpu is None else ("start", row.name, gpu))
        self.slow = row.name in args.slow
        if not self.slow:
            self.say("ready")

    def say(self, text):
        os.write(self.writing, f"{text}\n".encode())

    def write(self, text):
        self.log.append(("time", self.row.name))
        self.say(json.dumps({"attentions": {self.way: {"row": self.row.name}}}))

    def flush(self):
        pass

    def wait(self):
        self.stdout.close()
        os.close(self.writing)
        return 0


@pytest.fixture
def log(monkeypatch):
    """What is done to processes, in order."""
    monkeypatch.setattr(Child, "log", [])
    monkeypatch.setattr(apart, "SETTLED", 0)
    monkeypatch.setattr(apart, "_start", Child)
    monkeypatch.setattr(apart, "record_of", lambda row, outcomes, missing: outcomes)

    def send(self, number):
        Child.log.append((signal.Signals(number).name, self.row.name))
        child = self.children["official"]
        if number == signal.SIGCONT and child.slow:
            child.slow = False
            child.say("ready")

    monkeypatch.setattr(apart._Started, "send", send)
    return Child.log


def three_rows():
    return [replace(row, attentions=("official",), goals=()) for row in TINY_ROWS[:3]]


def arguments(processes, slow=(), device="cpu"):
    return argparse.Namespace(processes=processes, slow=slow, device=device)


def test_rows_are_compiled_together(log):
    a, b, c = (row.name for row in three_rows())
    args = arguments(2)
    found = [(row.name, record["official"]) for row, record in measure_apart(three_rows(), args)]
    assert found == [(name, {"row": name}) for name in (a, b, c)]
    assert log == [
        *(("start", a), ("start", b)),
        *(("SIGSTOP", b), ("time", a), ("SIGCONT", b)),
        *(("start", c), ("SIGSTOP", c), ("time", b), ("SIGCONT", c)),
        ("time", c),
    ]


def test_the_ways_of_a_row_take_turns(log, monkeypatch):
    """But for one that has failed before its first."""
    row = replace(TINY_ROWS[0], attentions=("one", "broken", "two"), goals=())

    class Patient(Child):
        turns = 0

        def __init__(self, row, way, *rest):
            super().__init__(row, way, argparse.Namespace(slow=(row.name,)), None)
            self.say(json.dumps({"reason": "broken"}) if way == "broken" else "ready")

        def write(self, text):
            self.log.append((self.way, text))
            self.turns += 1
            last = {"attentions": {self.way: {"turns": self.turns}}}
            self.say(json.dumps(last) if self.turns == apart.TURNS else "ready")

    monkeypatch.setattr(apart, "_start", Patient)
    ((_, outcomes),) = measure_apart([row], arguments(3))
    assert log[3:] == [("one", "\n"), ("two", "\n")] * apart.TURNS
    taken = {"turns": apart.TURNS}
    assert outcomes == {"one": taken, "broken": {"failed": "broken"}, "two": taken}


def test_a_process_may_die_before_its_turn(log, monkeypatch):
    class Gone(Child):
        def write(self, text):
            raise BrokenPipeError

        def wait(self):
            super().wait()
            return -9

    monkeypatch.setattr(apart, "_start", Gone)
    row = three_rows()[0]
    ((_, outcomes),) = measure_apart([row], arguments(1))
    assert outcomes == {"official": {"failed": "its process ended with status -9"}}


def test_a_timer_waits_before_each_turn(monkeypatch):
    """What it has measured is of all turns; nothing is new in them."""
    answers, calls = io.StringIO(), []
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * apart.TURNS))

    def times(call):
        said = answers.getvalue().splitlines()
        return [len(said), len(calls)]

    timer = apart.WaitingTimer(argparse.Namespace(device="cpu", times=times), answers)
    measured = timer.times(lambda: calls.append(0))
    assert measured == [x for turn in range(apart.TURNS) for x in (turn + 1, 3)]
    assert answers.getvalue() == "ready\n" * apart.TURNS and not sys.stdin.read()


def test_the_time_for_repeats_is_that_of_all_turns():
    args = argparse.Namespace(device="cpu", seconds=2.0, way="fbila", answers=None)
    made = []
    command.timer_of(args, lambda device, budget_ms: made.append(budget_ms) or args)
    assert made == [2000 / apart.TURNS]


def test_a_slow_row_waits_for_the_others(log):
    a, b, c = (row.name for row in three_rows())
    args = arguments(3, slow=(a,))
    assert [row.name for row, _ in measure_apart(three_rows(), args)] == [b, c, a]
    assert [name for what, name in log if what == "SIGSTOP"] == [a, c, a]


@pytest.mark.parametrize("visible, gpus", [("2,5", ["2", "5"]), (None, ["0", "1"])])
def test_rows_are_spread_over_gpus(log, monkeypatch, visible, gpus):
    monkeypatch.setattr(apart.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    rows = three_rows()
    # The first is on one of them still as the last is started.
    args = arguments(2, slow=(rows[0].name,), device="cuda")
    list(measure_apart(rows, args))
    first, second = gpus
    starts = [rest for what, *rest in log if what == "start"]
    assert starts == [[rows[0].name, first], [rows[1].name, second], [rows[2].name, second]]


def test_a_process_sees_its_gpu_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    started = []
    monkeypatch.setattr(apart.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    args = argparse.Namespace(name="benchmarks.unet", device="cuda", seconds=0.0)
    apart._start(TINY_ROWS[0], "official", args, "5")
    (env,) = started
    assert env["CUDA_VISIBLE_DEVICES"] == "5" and env["PATH"] == os.environ["PATH"]


def test_who_is_under_way_is_ended_with_an_error(log, monkeypatch):
    a, b, _ = (row.name for row in three_rows())

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(apart, "_next", fail)
    with pytest.raises(KeyboardInterrupt):
        list(measure_apart(three_rows(), arguments(2)))
    assert log[-2:] == [("SIGKILL", a), ("SIGKILL", b)]


def test_processes_that_are_halted_go_on():
    """A real one, which counts; what it has started halts with it."""
    code = (
        "import os, subprocess; os.setpgrp(); other = subprocess.Popen(['sleep', '100']); "
        "print('x', flush=True); other.wait()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    started = apart._Started(replace(TINY_ROWS[0], attentions=()), None, None)
    started.children = {"official": child}
    child.stdout.readline()

    def states():
        """Of the processes of its group, from what follows their names."""
        found = [
            stat.read_text().rpartition(") ")[2].split()
            for stat in Path("/proc").glob("[0-9]*/stat")
        ]
        return [state for state, _, group, *_ in found if group == str(child.pid)]

    def come_to(halted):
        """Signals are heard a little later."""
        for _ in range(100):
            if len(states()) == 2 and {state == "T" for state in states()} == {halted}:
                return True
            time.sleep(0.05)
        return False

    with apart._halted([started]):
        assert come_to(True)
    assert come_to(False)
    started.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("failures", [0, 2, 9])
def test_who_finds_too_little_memory_waits_for_the_others(failures, monkeypatch):
    (row,) = select(TINY_ROWS, ["eager/tiny/64"])
    slept, tries, answers = [], [], io.StringIO()
    monkeypatch.setattr(apart.time, "sleep", slept.append)

    def measure(row):
        tries.append(row.attentions)
        outcome = {"out_of_memory": "full"} if len(tries) <= failures else {"ms": 1.0}
        return {"attentions": {"official": outcome}}

    apart.answer("official", row, measure, answers)
    record = json.loads(answers.getvalue())["attentions"]["official"]
    assert record == ({"ms": 1.0} if failures < len(apart.PAUSES) else {"out_of_memory": "full"})
    assert tries == [("official",)] * min(failures + 1, len(apart.PAUSES))
    assert slept == list(apart.PAUSES[:failures])
