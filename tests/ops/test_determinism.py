"""The same bits from run to run, and whatever else is in the batch."""

import pytest
import torch
from helpers import CUDA, DTYPES, MEAN, SIMPLE, VARIANTS, make_qkv, run

# Several splits of the tokens, and a partial tile at the end.
SHAPE = (15, 4, 1000, 1100, 64, 64) if CUDA else (1, 2, 70, 1100, 16, 8)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)


def assert_same_bits(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@each_dtype
@each_variant
def test_repeats(variant, dtype, deterministic_algorithms):
    tensors = make_qkv(SHAPE, dtype)
    expected = run(variant, *tensors)
    for _ in range(250 if CUDA else 1):
        assert_same_bits(run(variant, *tensors), expected)


@pytest.mark.gpu
@each_dtype
def test_repeats_beside_a_busy_stream(dtype):
    tensors = make_qkv(SHAPE, dtype)
    expected = run(MEAN, *tensors)
    other, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(250):
        with torch.cuda.stream(other):
            matrix @ matrix
        assert_same_bits(run(MEAN, *tensors), expected)


def assert_alone_as_in_a_batch_of_nan(variant, tensors, place):
    batch = [x.new_full((7, *x.shape[1:]), float("nan")) for x in tensors]
    for x, y in zip(batch, tensors, strict=True):
        x[place] = y[0]
    results = [x[place : place + 1] for x in run(variant, *batch)]
    assert_same_bits(results, run(variant, *tensors))


@each_dtype
@each_variant
@pytest.mark.parametrize("place", [0, 4])
def test_an_item_alone_and_among_others(variant, dtype, place):
    assert_alone_as_in_a_batch_of_nan(variant, make_qkv((1, 2, 33, 20, 16, 8), dtype), place)


@each_dtype
def test_a_long_item_alone_and_among_others(dtype):
    assert_alone_as_in_a_batch_of_nan(MEAN, make_qkv((1, 1, 5, 530, 16, 8), dtype), 6)


@each_dtype
def test_a_head_alone_and_among_others(dtype):
    alone = make_qkv((1, 1, 33, 20, 16, 8), dtype)
    expected = run(SIMPLE, *alone)
    heads = [x.new_full((1, 5, *x.shape[2:]), float("nan")) for x in alone]
    for x, y in zip(heads, alone, strict=True):
        x[:, 3] = y[:, 0]
    assert_same_bits([x[:, 3:4] for x in run(SIMPLE, *heads)], expected)


@each_dtype
def test_many_rows_lengthen_runs_without_changing_bits(dtype, monkeypatch):
    tensors = make_qkv((1, 2, 333, 260, 16, 8), dtype)
    expected = run(MEAN, *tensors)
    monkeypatch.setattr("fbila.ops.kernels.tiling.ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr("fbila.ops.replay._PROGRAMS", {})
    assert_same_bits(run(MEAN, *tensors), expected)
