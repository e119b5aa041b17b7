"""Short sequences: one kernel does what two do for longer ones."""

import pytest
import torch
from helpers import ALL_VARIANTS, CUDA, DEVICE, LAYOUTS, LOW, MEAN, assert_accurate, make_qkv, run

import fbila
from fbila.ops import library
from fbila.ops.kernels import short

# (N, M): around the edges of a block of 64 tokens, and those of vision transformers.
LENGTHS = [(1, 1), (64, 63), (65, 2), (15, 129), (197, 197), (256, 256)]
HEAD_DIMS = [(64, 64), (1, 3), (40, 40), (17, 32), (32, 64), (64, 5)]

each_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)


@pytest.fixture
def served(monkeypatch):
    """How many calls went to the kernel of this file."""
    calls = []

    def counted(*arguments, launch=short.launch_short):
        calls.append(arguments)
        launch(*arguments)

    monkeypatch.setattr(short, "launch_short", counted)
    monkeypatch.setattr("fbila.ops.repeated._PASSED", {})
    return calls


@each_dtype
@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=lambda x: x.name)
@pytest.mark.parametrize("i", range(len(LENGTHS)))
def test_both_passes(i, variant, dtype, served):
    K, V = HEAD_DIMS[(i + ALL_VARIANTS.index(variant)) % len(HEAD_DIMS)]
    shape = (2, 3, *LENGTHS[i], K, V)
    assert_accurate(*make_qkv(shape, dtype, variant=variant), variant)
    assert served


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    tensors = make_qkv((2, 2, 70, 70, 40, 40), dtype)
    assert_accurate(*map(LAYOUTS[layout], tensors), MEAN)


@each_dtype
def test_the_state_and_the_denominators_are_those_of_two_kernels(dtype, monkeypatch):
    q, k, v, _ = make_qkv((2, 2, 130, 70, 40, 24), dtype)
    arguments = (*[None] * 5, "elu1", "mean", "none", 1.0, 1e-4)
    kept = library.forward(q, k, v, *arguments)
    monkeypatch.setattr(short, "LONGEST", 0)
    monkeypatch.setattr("fbila.ops.replay._PROGRAMS", {})
    for x, y in zip(kept, library.forward(q, k, v, *arguments), strict=True):
        eps = torch.finfo(x.dtype).eps
        torch.testing.assert_close(x, y, rtol=8 * eps, atol=8 * eps * float(y.abs().max()))


@each_dtype
def test_who_is_served(dtype, served):
    def call(N, M, H=2, Hk=2, D=16, dtype=dtype, **options):
        q, k, v, _ = make_qkv((1, H, N, M, D, D), dtype)
        before = len(served)
        fbila.linear_attn(q, k[:, :Hk], v[:, :Hk], feature_map="elu1", impl="triton", **options)
        return len(served) > before

    assert call(256, 256)
    assert not call(257, 16) and not call(16, 257)
    assert not call(16, 16, D=65)
    assert not call(16, 16, Hk=1)
    assert not call(16, 16, dtype=torch.float32)
    mask = torch.ones(1, 16, dtype=torch.bool, device=DEVICE)
    assert not call(16, 16, key_mask=mask)
    assert not call(16, 16, key_weight=mask.float())


@each_dtype
@pytest.mark.parametrize("variant", [MEAN, ALL_VARIANTS[2]], ids=lambda x: x.name)
def test_heads_and_repeats_do_not_change_bits(variant, dtype):
    tensors = make_qkv((3, 4, 70, 90, 16, 8), dtype)
    expected = run(variant, *tensors)
    alone = run(variant, *(x[1:2, 2:3] for x in tensors))
    for _ in range(250 if CUDA else 1):
        for x, y in zip(run(variant, *tensors), expected, strict=True):
            assert torch.equal(x, y)
    for x, y in zip(alone, expected, strict=True):
        assert torch.equal(x, y[1:2, 2:3])
