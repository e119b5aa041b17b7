"""Nothing is written outside the results, and no memory is read before it is written.

That nothing is read outside the inputs is in test_layouts: what lies between is NaN there.
"""

import pytest
import torch
from helpers import DTYPES, SIMPLE, VARIANTS, make_qkv, run

from fbila.ops import layout

SENTINEL = 77.0
MARGIN = 5000
# Partial tiles of tokens and of both widths; several splits; heads of several tiles.
SHAPES = [(1, 2, 33, 17, 17, 9), (1, 1, 520, 530, 3, 5), (1, 1, 3, 5, 140, 70)]

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)


class Fence:
    """Allocates each result inside a larger tensor filled with a sentinel."""

    def __init__(self):
        self.allocated = []

    def empty_like_order(self, x, width):
        B, H, N = x.shape[:3]
        sizes = (B + 2, H + 2, N + 70, width + 140)
        if layout.is_token_major(x):
            fenced = x.new_full((sizes[0], sizes[2], sizes[1], sizes[3]), SENTINEL).transpose(1, 2)
        else:
            fenced = x.new_full(sizes, SENTINEL)
        inside = (slice(1, B + 1), slice(1, H + 1), slice(3, N + 3), slice(5, width + 5))
        self.allocated.append((fenced, inside))
        return fenced[inside]

    def assert_intact(self):
        for fenced, inside in self.allocated:
            outside = torch.ones_like(fenced, dtype=torch.bool)
            outside[inside] = False
            assert (fenced[outside] == SENTINEL).all()


@each_shape
@each_variant
@pytest.mark.parametrize("token_major", [False, True])
def test_writes_stay_inside_the_results(variant, shape, token_major, monkeypatch):
    tensors = make_qkv(shape, torch.float32)
    if token_major:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    expected = run(variant, *tensors)
    fence = Fence()
    # A call like one before would not ask for the results there.
    monkeypatch.setattr("fbila.ops.repeated._PASSED", {})
    monkeypatch.setattr("fbila.ops.library.empty_like_order", fence.empty_like_order)
    actual = run(variant, *tensors)
    assert len(fence.allocated) == 4
    fence.assert_intact()
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@each_shape
@each_variant
def test_writes_stay_inside_the_state(variant, shape, monkeypatch):
    allocated = []

    original = torch.Tensor.new_empty

    def new_empty(self, *size, dtype=None, **options):
        size = size[0] if isinstance(size[0], tuple) else size
        if size == (0,):  # a handle of the interpreter's
            return original(self, 0, dtype=dtype, **options)
        size = torch.Size(size)
        flat = self.new_full((size.numel() + 2 * MARGIN,), SENTINEL, dtype=dtype or self.dtype)
        allocated.append(flat)
        return flat[MARGIN:-MARGIN].view(size)

    tensors = make_qkv(shape, torch.float32)
    expected = run(variant, *tensors)
    monkeypatch.setattr("fbila.ops.repeated._PASSED", {})
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    actual = run(variant, *tensors)
    monkeypatch.undo()
    assert len(allocated) >= 6
    for flat in allocated:
        assert (flat[:MARGIN] == SENTINEL).all() and (flat[-MARGIN:] == SENTINEL).all()
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@each_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
def test_uninitialised_memory_is_never_read(
    variant, shape, dtype, deterministic_algorithms, monkeypatch
):
    q, k, v, do = make_qkv(shape, dtype)
    assert q.new_empty(3).isnan().all()  # what deterministic_algorithms is here for
    for x in run(variant, q, k, v, do):
        assert not x.isnan().any()


def test_a_query_and_keys_of_one_storage_stay_as_they_were():
    x = make_qkv((1, 2, 20, 20, 16, 16), torch.float32)[0]
    kept = x.clone()
    run(SIMPLE, x, x, x, x)
    assert torch.equal(x, kept)
