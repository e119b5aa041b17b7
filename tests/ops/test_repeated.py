"""A call like one before skips the checks; one that differs in anything they look at does not."""

import pytest
import torch
from helpers import CUDA, DEVICE, DTYPES, LAYOUTS, VARIANTS, make_qkv, run

import fbila
from fbila.ops import functional, repeated


@pytest.fixture
def checked(monkeypatch):
    """What `check_tensors` was called with, from a clean slate."""
    calls, original = [], functional.check_tensors
    monkeypatch.setattr(repeated, "_PASSED", {})
    monkeypatch.setattr(
        functional,
        "check_tensors",
        lambda *x, **options: calls.append(x) or original(*x, **options),
    )
    return calls


def attend(q, k, v, **options):
    return fbila.linear_attn(q, k, v, **{"feature_map": "elu1", "impl": "triton", **options})


def test_the_second_call_is_not_checked(checked):
    q, k, v, _ = make_qkv((1, 2, 5, 7, 4, 6), torch.float32)
    first = attend(q, k, v)
    assert torch.equal(attend(q, k, v), first)
    assert len(checked) == 1
    attend(q[:, :, :4], k, v)
    attend(q, k, v, eps=0.5)
    attend(q, k, v, feature_map="relu")
    assert len(checked) == 4


def test_the_second_call_has_gradients(checked):
    q, k, v, do = make_qkv((1, 2, 5, 7, 4, 6), torch.float32)
    attend(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    actual = torch.autograd.grad(attend(*leaves), leaves, do)
    assert len(checked) == 1
    expected = torch.autograd.grad(attend(*leaves, impl="reference"), leaves, do)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_what_differs_still_raises(checked):
    q, k, v, _ = make_qkv((1, 2, 5, 7, 4, 6), torch.float32)
    attend(q, k, v)
    for bad in (
        (q, k.double(), v),
        (q, k[:, :, :6], v),
        (q[0], k, v),
        (q, k.to("meta"), v),
        (q, k, v.to_sparse()),
        (q, k, None),
    ):
        with pytest.raises((TypeError, ValueError)):
            attend(*bad)
    for name, value in (("eps", -1.0), ("normalizer", "max"), ("feature_map", "gelu")):
        with pytest.raises(ValueError, match=name):
            attend(q, k, v, **{name: value})
    with pytest.raises(ValueError, match="impl must be"):
        attend(q, k, v, impl="cuda")


def test_options_are_checked_each_time(checked):
    q, k, v, _ = make_qkv((1, 2, 5, 7, 4, 6), torch.float32)
    attend(q, k, v)
    with pytest.raises(ValueError, match="key_weight must have shape"):
        attend(q, k, v, key_weight=torch.ones(1, 6, device=DEVICE))


def test_autocast_still_casts(checked):
    q, k, v, _ = make_qkv((1, 2, 5, 7, 4, 6), torch.float32)
    assert attend(q, k, v).dtype == torch.float32
    with torch.autocast(DEVICE, torch.float16 if CUDA else torch.bfloat16):
        # The interpreter refuses bfloat16, which shows that the cast took place.
        if CUDA:
            assert attend(q, k, v).dtype == torch.float16
        else:
            with pytest.raises(TypeError, match="bfloat16"):
                attend(q, k, v)


def test_what_autocast_leaves_alone_is_not_checked_again(checked):
    low = torch.float16
    q, k, v, do = make_qkv((1, 2, 5, 7, 4, 6), low)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attend(*leaves), leaves, do)
    # The CPU's own float16 is not what its autocast would choose by itself.
    with torch.autocast(DEVICE, low):
        o = attend(*leaves)
        assert o.dtype == low and len(checked) == 1
        attend(q.float(), k.float(), v.float())
        assert len(checked) == 2
    for x, y in zip(torch.autograd.grad(o, leaves, do), expected, strict=True):
        assert torch.equal(x, y)


def test_what_is_remembered_is_bounded(checked, monkeypatch):
    monkeypatch.setattr(repeated, "MOST", 2)
    q, k, v, _ = make_qkv((1, 1, 6, 2, 2, 2), torch.float32)
    for n in range(1, 6):
        attend(q[:, :, :n], k, v)
    assert len(repeated._PASSED) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
@pytest.mark.parametrize("layout", ["head_major", "token_major", "offset_by_one"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 5, 7, 5, 6),
        (2, 3, 40, 2100, 40, 40) if CUDA else (2, 2, 20, 33, 40, 36),
        (1, 1, 9, 9, 80, 16),
    ],
)
def test_calls_again_have_the_same_bits(shape, layout, variant, dtype, checked):
    tensors = make_qkv(shape, dtype, variant=variant)
    tensors = [LAYOUTS.get(layout, lambda x: x)(x) for x in tensors]
    # A GPU starts what is compiled in a third way once it has run.
    times = 3 if CUDA else 2
    with torch.no_grad():
        outputs = [variant(*tensors[:3]) for _ in range(times)]
    results = [run(variant, *tensors) for _ in range(times)]
    for result in results:
        assert torch.equal(result[0], outputs[0])
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    assert all(torch.equal(o, outputs[0]) for o in outputs)
    # Other values are other results.
    others = [2 * x for x in tensors]
    assert not torch.equal(run(variant, *others)[3], results[0][3])


def test_gradients_in_another_memory_order(checked):
    q, k, v, do = make_qkv((2, 3, 40, 50, 16, 16), torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attend(*leaves), leaves, do)
    token_major = do.transpose(1, 2).contiguous().transpose(1, 2)
    for gradient in 2 * (do, token_major, do[:1].expand(2, -1, -1, -1)):
        actual = torch.autograd.grad(attend(*leaves), leaves, gradient)
        truth = torch.autograd.grad(attend(*leaves, impl="reference"), leaves, gradient)
        for x, y in zip(actual, truth, strict=True):
            torch.testing.assert_close(x, y)
    again = torch.autograd.grad(attend(*leaves), leaves, do)
    assert all(torch.equal(x, y) for x, y in zip(again, expected, strict=True))
