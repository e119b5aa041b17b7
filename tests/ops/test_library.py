"""The registered operators pass PyTorch's own checks of custom operators."""

import pytest
import torch
from helpers import DEVICE, LAYOUTS, MEAN, SIMPLE, SUM, make_qkv, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

OPTIONS = {
    "mean": ("elu1", "mean", 1.0, 1e-6),
    "sum": ("relu", "sum", 1.0, 1e-15),
    "none": ("none", "none", 0.25, 0.0),
}

each_case = pytest.mark.parametrize(
    "layout, dtype, options",
    [
        pytest.param(layout, dtype, OPTIONS[name], id=f"{name}-{layout}-{dtype}")
        for name, layout, dtype in [
            ("mean", None, torch.float32),
            ("mean", "packed_qkv", torch.float16),
            ("sum", "token_major", torch.float32),
            ("none", None, torch.float16),
            ("none", "packed_qkv", torch.float32),
        ]
    ],
)


NO_KEY_OPTIONS = (None, None, None)


def key_options(dtype):
    """key_weight, key_mask and count for keys `(1, 2, 7, ...)`."""
    weight = torch.arange(14.0, device=DEVICE).reshape(1, 2, 7)
    mask = torch.tensor([[1, 0, 1, 1, 1, 0, 1]], dtype=dtype, device=DEVICE)
    return weight, mask, mask.sum(-1, dtype=torch.float32)


def tensors(dtype, layout, shape=(1, 2, 5, 7, 4, 6)):
    made = make_qkv(shape, dtype)
    return [LAYOUTS[layout](x) for x in made] if layout else made


@each_case
def test_linear_attn(layout, dtype, options):
    q, k, v, _ = tensors(dtype, layout)
    op = torch.ops.fbila.linear_attn.default
    keys = key_options(dtype)
    opcheck(op, (q, k, v, *keys, *options))
    leaves = [x.requires_grad_() for x in (q, k, v, keys[0])]
    opcheck(op, (*leaves, *keys[1:], *options))
    opcheck(op, (q, k.detach(), v.detach(), *NO_KEY_OPTIONS, *options))


@each_case
def test_forward_and_backward(layout, dtype, options):
    q, k, v, do = tensors(dtype, layout)
    backward = torch.ops.fbila.linear_attn_backward.default
    for keys in (NO_KEY_OPTIONS, key_options(dtype)):
        inputs = (q, k, v, *keys)
        opcheck(torch.ops.fbila.linear_attn_forward.default, (*inputs, *options))
        _, state, inverse = torch.ops.fbila.linear_attn_forward(*inputs, *options)
        for needs_grad in ([True, True], [True, False], [False, True]):
            opcheck(backward, (do, *inputs, state, inverse, *options, needs_grad))


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 5, 7, 4, 6), (2, 3, 0, 7, 4, 6), (2, 3, 5, 0, 4, 6), (2, 3, 5, 7, 4, 0)],
    ids=str,
)
def test_empty_inputs(shape):
    q, k, v, do = tensors(torch.float32, None, shape)
    options = OPTIONS["mean"]
    opcheck(torch.ops.fbila.linear_attn.default, (q, k, v, *NO_KEY_OPTIONS, *options))
    opcheck(torch.ops.fbila.linear_attn_forward.default, (q, k, v, *NO_KEY_OPTIONS, *options))
    _, state, inverse = torch.ops.fbila.linear_attn_forward(q, k, v, *NO_KEY_OPTIONS, *options)
    backward = torch.ops.fbila.linear_attn_backward.default
    opcheck(backward, (do, q, k, v, *NO_KEY_OPTIONS, state, inverse, *options, [True, True]))


@pytest.mark.parametrize("layout", [None, "token_major", "packed_qkv", "token_contiguous"])
def test_fakes_return_the_strides_of_the_real_ones(layout):
    made = tensors(torch.float16, layout)
    options = OPTIONS["mean"]

    def results(do, q, k, v):
        # Inference mode goes below autograd, straight to the implementation or the fake.
        with torch.inference_mode():
            o = torch.ops.fbila.linear_attn(q, k, v, *NO_KEY_OPTIONS, *options)
            o2, state, inverse = torch.ops.fbila.linear_attn_forward(
                q, k, v, *NO_KEY_OPTIONS, *options
            )
            backward = torch.ops.fbila.linear_attn_backward
            gradients = backward(
                do, q, k, v, *NO_KEY_OPTIONS, state, inverse, *options, [True, True]
            )
        return [
            (x.shape, x.stride(), x.dtype, x.device) for x in (o, o2, state, inverse, *gradients)
        ]

    real = results(made[3], *made[:3])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (made[3], *made[:3])]
        assert results(*fakes) == real


def test_several_tiles_and_splits():
    for shape in ((1, 1, 3, 5, 140, 70), (1, 1, 600, 530, 4, 4)):
        q, k, v, _ = tensors(torch.float32, None, shape)
        opcheck(torch.ops.fbila.linear_attn.default, (q, k, v, *NO_KEY_OPTIONS, *OPTIONS["mean"]))


@pytest.mark.parametrize(
    "variant, options",
    [
        (MEAN, ("elu1", "mean", 1.0, 1e-4)),
        (SUM, ("relu", "sum", 1.0, 1e-15)),
        (SIMPLE, ("none", "none", 0.5, 0.0)),
        (SIMPLE._replace(scale=3.0), ("none", "none", 3.0, 0.0)),
    ],
)
def test_public_functions_are_this_operator(variant, options):
    q, k, v, do = tensors(torch.float32, None)
    expected = run(
        lambda *x: torch.ops.fbila.linear_attn(*x, *NO_KEY_OPTIONS, *options), q, k, v, do
    )
    for x, y in zip(run(variant, q, k, v, do), expected, strict=True):
        assert torch.equal(x, y)
