"""The bytes that must move, the floor, and what targets make of it."""

import pytest

from benchmarks.cases import Case
from benchmarks.floor import floor_ms, pass_bytes
from benchmarks.targets import Target, fraction_of_floor, verdict

TENSOR = 8 * 16384 * 16 * 64 * 2  # bytes of one tensor in half precision


@pytest.mark.parametrize("name, tensors", [("forward", 4), ("backward", 7)])
def test_self_attention(name, tensors):
    assert pass_bytes(Case("large", 8, 16384, 16, 64), name) == tensors * TENSOR


def test_both_passes():
    case = Case("vit", 64, 197, 12, 64)
    both = pass_bytes(case, "forward") + pass_bytes(case, "backward")
    assert pass_bytes(case, "forward+backward") == both


def test_other_number_of_keys():
    case = Case("middle", 1, 100, 1, 8, M=10, dtype="float32")
    assert pass_bytes(case, "forward") == 4 * 8 * (2 * 100 + 2 * 10)  # q, o; k, v
    assert pass_bytes(case, "backward") == 4 * 8 * (3 * 100 + 4 * 10)  # q, do, dq; k, v, dk, dv


def test_floor():
    assert floor_ms(4 * TENSOR, 4248e9) == pytest.approx(0.253, abs=5e-4)


def test_fraction_of_floor():
    target = fraction_of_floor(0.9)
    assert verdict(target, 0.9, {"floor": 0.9})["over"] == pytest.approx(-0.1)
    assert verdict(target, 1.1, {"floor": 0.9})["over"] == pytest.approx(0.1)


def test_floor_and_microseconds():
    target = Target("floor", 1.5, plus_ms=6e-3)
    assert target.limit_ms({"floor": 0.01}) == pytest.approx(0.021)
    assert str(target) == "1.5 floor + 6 us"


def test_the_clock():
    target = Target(None, plus_ms=35e-3)
    assert target.limit_ms({}) == 35e-3
    assert str(target) == "35 us"


def test_reference_that_was_not_measured():
    found = verdict(Target("sdpa", 0.8), 1.0, {"floor": 1.0})
    assert found == {"target": "0.8 sdpa", "limit_ms": None, "over": None}
