"""Inputs are read in place whatever their strides, and the result does not depend on them."""

import pytest
import torch
from helpers import LAYOUTS, MEAN, SIMPLE, VARIANTS, assert_same_bits, make_qkv, run
from torch.utils._python_dispatch import TorchDispatchMode

import fbila
from fbila.ops import library
from fbila.ops.kernels.memory import Axes, Layout

SHAPE = (2, 2, 33, 20, 17, 8)
DTYPES = [torch.float16, torch.float32]

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def kind(*tensors):
    layout = Layout.of(tensors[0].itemsize, *(Axes(x.shape, x.stride()) for x in tensors))
    return layout.orders, layout.unit


@each_layout
@each_dtype
@pytest.mark.parametrize("width", [8, 17])
@pytest.mark.parametrize("variant", [MEAN, SIMPLE], ids=lambda x: x.name)
def test_same_bits_as_contiguous(variant, width, dtype, layout):
    tensors = make_qkv((2, 2, 33, 20, width, 8), dtype)
    expected = run(variant, *tensors)
    views = [LAYOUTS[layout](x) for x in tensors]
    kept = [x.clone() for x in views]
    # The compiler lays tiles over the threads by what it knows of the strides: which is 1, and how
    # many elements can be loaded at once.
    reordered = dtype == torch.float32 or kind(*views) != kind(*tensors)
    assert_same_bits(run(variant, *views), expected, reordered=reordered)
    assert_same_bits(views, kept)


@each_dtype
def test_each_tensor_in_a_layout_of_its_own(dtype):
    tensors = make_qkv(SHAPE, dtype)
    names = ["packed_qkv", "token_contiguous", "sliced_last_dim", "token_major"]
    views = [LAYOUTS[name](x) for name, x in zip(names, tensors, strict=True)]
    assert_same_bits(run(MEAN, *views), run(MEAN, *tensors), reordered=True)


def test_memory_of_the_other_sign():
    """The imaginary part of a conjugate is a view of numbers that are to be negated."""
    q, k, v, do = make_qkv((1, 2, 5, 6, 8, 8), torch.float32)
    z = torch.complex(k, k - 1).conj().imag
    assert z.is_neg()
    for implementation in ("triton", "reference"):
        results = []
        for key in (z, z.resolve_neg()):
            leaf = key.detach().requires_grad_()
            o = fbila.linear_attn(q, leaf, v, impl=implementation)
            state = fbila.linear_attn_state(leaf, v, impl=implementation)
            gradient = torch.autograd.grad(o, leaf, do)[0].resolve_neg()
            results.append((o, gradient, state.kv, fbila.linear_attn(leaf.detach(), z, v)))
        torch.testing.assert_close(*results)


@each_dtype
def test_expanded_heads_and_gradients(dtype):
    q, k, v, do = make_qkv(SHAPE, dtype)
    shared = [x[:, :1].expand_as(x) for x in (q, k, v)]
    one_gradient = do[:1, :1, :1, :1].expand_as(do)  # what o.sum().backward() passes
    assert all(x.stride(1) == 0 for x in shared)
    expected = run(MEAN, *(x.contiguous() for x in (*shared, one_gradient)))
    assert_same_bits(run(MEAN, *shared, one_gradient), expected)


def test_gradients_reach_a_packed_projection():
    B, H, N, D = 2, 3, 20, 8
    packed = torch.randn(B, N, 3, H, D, device=make_qkv(SHAPE, torch.float32)[0].device)
    results = []
    for impl in ("triton", "reference"):
        leaf = packed.clone().requires_grad_()
        q, k, v = (x.transpose(1, 2) for x in leaf.unbind(2))
        (fbila.linear_attn(q, k, v, feature_map="elu1", impl=impl) ** 2).sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class Operations(TorchDispatchMode):
    """Records the names of all ATen operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@each_layout
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
def test_nothing_is_copied(variant, layout, launches):
    q, k, v, do = (LAYOUTS[layout](x) for x in make_qkv(SHAPE, torch.float32))
    absent = [None] * 5
    kind = (variant.feature_map or "none", variant.normalizer or "none", "none", 1.0, 1e-6)
    with Operations() as operations:
        _, state, inverse = library.forward(q, k, v, *absent, *kind)
        library.backward(do, q, k, v, *absent, state, inverse, *kind, [True, True])
    assert len(launches) == 4
    assert operations.names <= {"new_empty", "transpose", "view"}


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("variant", [MEAN, SIMPLE], ids=lambda x: x.name)
def test_output_lies_in_memory_as_the_query_does(variant, impl):
    q, k, v, do = make_qkv(SHAPE, torch.float32)
    B, H, N, V = do.shape
    head_major = variant(q, k, v, impl=impl)
    assert head_major.is_contiguous()
    for layout in ("token_major", "packed_qkv"):
        o = variant(LAYOUTS[layout](q), k, v, impl=impl)
        assert o.shape == (B, H, N, V)
        assert o.stride() == (N * H * V, V, H * V, 1)
        merged = o.transpose(1, 2).flatten(2)
        assert merged.data_ptr() == o.data_ptr() and merged.shape == (B, N, H * V)
    o = variant(LAYOUTS["token_contiguous"](q), k, v, impl=impl)
    picture = o.transpose(2, 3).flatten(1, 2)
    assert picture.data_ptr() == o.data_ptr() and picture.is_contiguous()
    # The keys have no say.
    assert variant(q, *(LAYOUTS["token_major"](x) for x in (k, v)), impl=impl).is_contiguous()


def test_gradients_lie_in_memory_as_their_inputs_do():
    q, k, v, do = make_qkv(SHAPE, torch.float32)
    k = LAYOUTS["token_major"](k)
    _, dq, dk, dv = run(MEAN, q, k, v, do)
    assert dq.is_contiguous() and dv.is_contiguous()
    assert dk.transpose(1, 2).is_contiguous()
