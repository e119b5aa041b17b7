"""Ways in processes of their own make the record that one process would make."""

import argparse
import io
import json
from dataclasses import replace

import pytest

from benchmarks import apart
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


def test_rows_are_compiled_together(monkeypatch):
    rows = [replace(row, attentions=("official",), goals=()) for row in TINY_ROWS[:3]]
    order = []

    class Child:
        def __init__(self, row, way, args):
            self.row, self.stdin, self.stdout = row, self, self
            self.lines = ["ready\n", json.dumps({"attentions": {way: {"row": row.name}}})]
            order.append("start")

        def readline(self):
            return self.lines.pop(0)

        def write(self, text):
            order.append(self.row.name)

        def flush(self):
            pass

        kill = flush

        def wait(self):
            return 0

    monkeypatch.setattr(apart, "_start", Child)
    monkeypatch.setattr(apart, "record_of", lambda row, outcomes, missing: outcomes)
    records = list(measure_apart(rows, argparse.Namespace(processes=2)))
    names = [row.name for row in rows]
    assert [record["official"]["row"] for _, record in records] == names
    assert order == ["start", "start", *names[:2], "start", names[2]]


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
