"""Fixtures of the benchmarks' tests: small cases, and a made-up result."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from stand_ins import MACHINE, FakeTimer

from benchmarks import cases
from benchmarks.floor import pass_bytes
from benchmarks.targets import Target, fraction_of_floor


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors wait for their threads more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def timer():
    return FakeTimer()


@pytest.fixture
def small():
    """A case that a CPU computes at once."""
    return cases.Case(
        "large", 2, 96, 3, 16, dtype="float32", targets={"forward": fraction_of_floor(0.9)}
    )


@pytest.fixture
def registry(monkeypatch, small):
    """Three small cases in place of the registry."""
    host = cases.Case(
        "host", 1, 8, 2, 4, dtype="float32", method="host", passes=("forward", "forward+backward"),
        targets={"forward": Target(None, plus_ms=0.5)},
    )  # fmt: skip
    middle = cases.Case("middle", 1, 32, 2, 8, dtype="float32", method="graph", peers=("eager",))
    monkeypatch.setattr(cases, "CASES", (small, middle, host))
    return cases.CASES


@pytest.fixture
def result():
    """What a run of the sweep could have given, with every kind of record."""
    records = {}
    for case in cases.select(["sweep"]):
        passes = {}
        for kind in case.passes:
            floor = pass_bytes(case, kind) / 4e12 * 1e3
            ms = floor / (0.95 - case.D / 600) + 0.006
            row = {"ms": ms, "ms_20": 0.98 * ms, "ms_80": 1.03 * ms, "peak_bytes": 2**20}
            row |= {"floor_ms": floor, "floor_fraction": floor / ms, "peers": {}}
            if case.axis == "N":
                row["peers"] = {
                    "eager": {"ms": 3.4 * floor + 0.03, "way": "eager"},
                    "compiled": {"ms": 2.1 * floor + 0.02, "way": "default"},
                    "sdpa": {"ms": 0.004 + 2.2e-8 * case.N**2, "way": "cudnn"},
                    "flash_bla": {"ms": 1.9 * floor + 0.03, "way": "flash_bla"},
                }
                if case.N > 100_000:
                    row["peers"]["sdpa"] = {"absent": "6e14 operations"}
            passes[kind] = row
        records[case.name] = {"case": asdict(case), "status": "measured", "passes": passes}
    skipped = cases.select(["options"], "rotary")[0]
    records[skipped.name] = {"case": asdict(skipped), "status": "skipped", "reason": "not yet"}
    return {"machine": MACHINE, "cases": records}
