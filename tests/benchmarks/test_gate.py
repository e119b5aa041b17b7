"""The gate lets right functions through, in every dtype, and stops wrong ones."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gate
from benchmarks.cases import Case
from benchmarks.eager import FEATURE_MAPS, eager
from benchmarks.operators import make_inputs, make_operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = Case("large", 2, 200, 3, 24, dtype="float16")


def check(function, case=CASE, plain=eager):
    operator = make_operator(case, DEVICE)
    inputs = make_inputs(case, DEVICE)
    truth = lambda q, k, v: operator(q, k, v, impl="reference")  # noqa: E731
    return gate.check(function, truth, plain(case) if plain else None, inputs)


def right(q, k, v):
    return make_operator(CASE, DEVICE)(q, k, v)


@pytest.mark.parametrize("operator", ["linear_attn", "simple_la"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_eager_is_the_specification(operator, feature_map):
    case = replace(CASE, operator=operator, feature_map=feature_map)
    q, k, v = (x.double() for x in make_inputs(case, DEVICE)[:3])
    expected = make_operator(case, DEVICE)(q, k, v, impl="reference")
    torch.testing.assert_close(eager(case)(q, k, v), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["token_major", "head_major"])
@pytest.mark.parametrize("with_plain", [True, False])
def test_green(dtype, layout, with_plain):
    case = replace(CASE, dtype=dtype, layout=layout)
    errors = check(make_operator(case, DEVICE), case, plain=eager if with_plain else None)
    assert list(errors) == ["o", "dq", "dk", "dv"]
    assert gate.passed(errors), errors


@pytest.mark.parametrize("M", [None, 77])
def test_green_for_the_kernels(M):
    case = replace(CASE, B=1, H=2, N=70, D=16, M=M)
    operator = make_operator(case, DEVICE)
    errors = check(lambda q, k, v: operator(q, k, v, impl="triton"), case)
    assert gate.passed(errors), errors


class WrongKeyGradient(torch.autograd.Function):
    """The identity, with a gradient that is 5 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return 1.05 * dx


def last_head_wrong(q, k, v):
    o = right(q, k, v)
    return torch.cat([o[:, :-1], 1.01 * o[:, -1:]], dim=1)


WRONG = {
    "scaled": (lambda q, k, v: 1.01 * right(q, k, v), {"o"}),
    "no feature map": (lambda q, k, v: right(q.abs(), k.abs(), v), {"o", "dq", "dk", "dv"}),
    "NaN": (lambda q, k, v: right(q, k, v) * float("nan"), {"o", "dq", "dk", "dv"}),
    "one head": (last_head_wrong, {"o"}),
    "dk alone": (lambda q, k, v: right(q, WrongKeyGradient.apply(k), v), {"dk"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_red(name):
    function, wrong = WRONG[name]
    errors = check(function)
    assert not gate.passed(errors)
    assert wrong <= {key for key, entry in errors.items() if not entry["ok"]}
    if name == "dk alone":
        assert all(errors[key]["ok"] for key in ("o", "dq", "dv"))


def test_plain_that_overflows_bounds_nothing():
    overflowing = lambda case: lambda q, k, v: right(q, k, v) * torch.inf  # noqa: E731
    errors = check(right, plain=overflowing)
    assert gate.passed(errors)
    assert all(entry["bound"] < float("inf") for entry in errors.values())


def test_peer_error():
    inputs = make_inputs(CASE, DEVICE)
    assert gate.relative_error(eager(CASE), right, inputs) < gate.PEER_ERROR
    assert gate.relative_error(lambda q, k, v: v, right, inputs) > gate.PEER_ERROR
