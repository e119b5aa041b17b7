"""How the separable convolution divides pictures: into strips, chunks of rows, and programs."""

from functools import partial

import pytest
import torch

from fbila.ops.kernels import separable_conv
from fbila.ops.kernels.rolling_rows import split_rows
from fbila.ops.kernels.separable_conv import plan_separable_conv
from fbila.ops.separable_conv_library import in_kernel

from .separable_cases import assert_near, draw, each_format, exact


@pytest.mark.parametrize("k", [3, 5, 7])
@each_format
def test_any_number_of_columns(k, order):
    """Lanes that end in the picture, at its edge and beyond, in one program and in several."""
    x, *weights = draw((1, 8, 2, 70), 8, k, torch.float32, order=order)
    # A program has 16 columns.
    for width in (*range(1, 37), 64, 70) if k == 5 else (3, 4, 5, 8, 9, 32, 33, 37, 65):
        part = x[..., :width]
        assert_near(in_kernel(part, *weights), exact(part, *weights))


@pytest.fixture
def rows_of(monkeypatch):
    """A function that makes the kernel divide pictures into chunks of so many rows."""

    def divide(rows):
        monkeypatch.setattr(separable_conv, "ROWS", rows)
        monkeypatch.setattr(separable_conv, "PROGRAMS", 1)
        plan_separable_conv.cache_clear()

    yield divide
    plan_separable_conv.cache_clear()


@pytest.mark.parametrize("k", [1, 3, 5, 7])
@each_format
def test_results_are_the_same_in_any_chunks_of_rows(rows_of, k, order):
    """And right, with a bias that rows begin with: also those that begin above the picture."""
    tensors = draw((2, 16, 11, 14), 8, k, torch.float32, order=order)
    rows_of(11)
    whole = in_kernel(*tensors)
    assert_near(whole, exact(*tensors))
    for rows in (2, 4):
        rows_of(rows)
        assert torch.equal(in_kernel(*tensors), whole)


@pytest.mark.parametrize("size", [(7, 7), (9, 14), (3, 33)], ids=str)
@each_format
def test_results_do_not_depend_on_other_samples(size, order):
    """Lanes of several samples share a program."""
    x, *weights = draw((5, 16, *size), 16, 5, torch.float32, order=order)
    together = in_kernel(x, *weights)
    for i in range(5):
        alone = in_kernel(x[i : i + 1].contiguous(memory_format=order), *weights)
        assert torch.equal(together[i : i + 1], alone)


def test_rows_are_divided_for_enough_programs():
    split = partial(split_rows, most=64, fewest=8, least=1024)
    assert split(32, 2000) == (1, 32)
    assert split(256, 2000) == (4, 64)
    assert split(65, 2000) == (2, 33)
    assert split(32, 512) == (2, 16)
    assert split(32, 1) == (4, 8)
    assert split(14, 1) == (1, 14)
    assert split(16, 1) == (2, 8)
    for height in range(1, 200):
        chunks, rows = split(height, 1)
        assert (chunks - 1) * rows < height <= chunks * rows and rows >= min(height, 8)
