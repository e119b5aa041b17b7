"""The registered operators pass PyTorch's own checks of custom operators."""

import pytest
import torch
from helpers import DEVICE, LAYOUTS, MEAN, SIMPLE, SUM, make_qkv, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fbila

OPS = torch.ops.fbila
SHAPE = (1, 2, 5, 7, 4, 6)  # B, H, N, M, K, V
NONE = (None,) * 5
# feature_map, normalizer, rotary, scale and eps, of which rotary is that of the inputs.
OPTIONS = {
    "mean": ("elu1", "mean", "none", 1.0, 1e-6),
    "sum": ("relu", "sum", "none", 1.0, 1e-15),
    "none": ("none", "none", "none", 0.25, 0.0),
}

each_case = pytest.mark.parametrize(
    "kind, layout, dtype, normalizer",
    [
        ("plain", None, torch.float32, "mean"),
        ("plain", "packed_qkv", torch.float32, "none"),
        ("keys", "packed_qkv", torch.float16, "mean"),
        ("keys", "token_major", torch.float32, "sum"),
        ("grouped", None, torch.float16, "none"),
        ("interleaved", "token_major", torch.float32, "sum"),
        ("halves", "packed_qkv", torch.float16, "mean"),
        ("packed", None, torch.float32, "mean"),
        ("packed with all", "packed_qkv", torch.float16, "sum"),
    ],
    ids=str,
)
each_halves_case = pytest.mark.parametrize(
    "kind, layout, dtype, normalizer",
    [
        ("plain", None, torch.float32, "mean"),
        ("keys", "packed_qkv", torch.float16, "mean"),
        ("grouped", "token_major", torch.float32, "sum"),
        ("interleaved", "token_major", torch.float16, "sum"),
        ("halves", None, torch.float32, "mean"),
    ],
    ids=str,
)
each_focused_case = pytest.mark.parametrize(
    "kind, layout, dtype",
    [
        ("plain", "token_major", torch.float32),
        ("keys", "packed_qkv", torch.float16),
    ],
    ids=str,
)
LAYOUT_NAMES = [None, "token_major", "packed_qkv", "token_contiguous"]
each_layout = pytest.mark.parametrize("layout", LAYOUT_NAMES, ids=str)


def tensors(dtype, layout, shape=SHAPE):
    made = make_qkv(shape, dtype)
    return [LAYOUTS[layout](x) for x in made] if layout else made


def keys_of(dtype, B=1, H=2, M=7):
    """key_weight, key_mask and count."""
    weight = torch.arange(1.0, B * H * M + 1, device=DEVICE).view(B, H, M)
    mask = (torch.arange(B * M, device=DEVICE).view(B, M) % 3 != 1).to(dtype)
    return weight, mask, mask.sum(-1, dtype=torch.float32)


def table_of(dtype, H, N, K=4):
    angles = torch.arange(float(H * N * K), device=DEVICE).view(H, N, K)
    return angles.cos().to(dtype)


def inputs(kind, dtype, layout, normalizer="mean"):
    """do, then q, k, v, key_weight, key_mask, count, table and cu_seqlens, then the options."""
    rotary = {"interleaved": "interleaved", "halves": "halves", "packed with all": "halves"}
    same_length = kind in ("interleaved", "halves", "packed", "packed with all")
    q, k, v, do = tensors(dtype, layout, (1, 2, 7, 7, 4, 6) if same_length else SHAPE)
    if kind.startswith("packed"):
        # One head: the interpreter runs a program for every sequence.
        q, k, v, do = (x[:, :1] for x in (q, k, v, do))
    weight = mask = count = table = bounds = None
    if kind in ("keys", "packed with all"):
        weight, mask, count = keys_of(dtype, H=k.shape[1])
    if kind == "grouped":
        k, v = k[:, :1], v[:, :1]
    if kind in rotary:
        table = table_of(dtype, 2 if kind == "halves" else 1, 7)
    if kind.startswith("packed"):
        bounds = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=DEVICE)
        count = bounds.diff().float()
    if normalizer == "none":
        count = None
    feature_map, _, _, *scalars = OPTIONS[normalizer]
    options = (feature_map, normalizer, rotary.get(kind, "none"), *scalars)
    return do, (q, k, v, weight, mask, count, table, bounds), options


def check_gradients(op, arguments, *places):
    """`opcheck` with gradients wanted at these places, where there are tensors.

    It would pass if there were none: they must be there, of the right shape.
    """
    places = [i for i in places if arguments[i] is not None]
    arguments = [x.detach().requires_grad_() if i in places else x for i, x in enumerate(arguments)]
    leaves, o = [arguments[i] for i in places], op(*arguments)
    gradients = torch.autograd.grad(o, leaves, torch.ones_like(o), allow_unused=True)
    for x, gradient in zip(leaves, gradients, strict=True):
        assert gradient is not None and gradient.shape == x.shape
    opcheck(op, arguments)


@each_case
def test_linear_attn(kind, layout, dtype, normalizer):
    _, arguments, options = inputs(kind, dtype, layout, normalizer)
    op, arguments = OPS.linear_attn.default, (*arguments, *options)
    opcheck(op, arguments)
    check_gradients(op, arguments, 0, 1, 2, 3)
    if kind in ("plain", "keys"):
        check_gradients(op, arguments, 0)


@each_case
def test_forward_and_backward(kind, layout, dtype, normalizer):
    do, arguments, options = inputs(kind, dtype, layout, normalizer)
    opcheck(OPS.linear_attn_forward.default, (*arguments, *options))
    _, *kept = OPS.linear_attn_forward(*arguments, *options)
    for needs_grad in ([True, True], [True, False]):
        opcheck(OPS.linear_attn_backward.default, (do, *arguments, *kept, *options, needs_grad))


EMPTY = [(0, 3, 5, 7, 4, 6), (2, 3, 0, 7, 4, 6), (2, 3, 5, 0, 4, 6), (2, 3, 5, 7, 4, 0)]
each_empty = pytest.mark.parametrize("shape", EMPTY, ids=str)


@each_empty
def test_empty_inputs(shape):
    q, k, v, do = tensors(torch.float32, None, shape)
    keys = (*keys_of(torch.float32, shape[0], 3, shape[3]), None, None)
    options = OPTIONS["mean"]
    for more in (NONE, keys):
        opcheck(OPS.linear_attn.default, (q, k, v, *more, *options))
        opcheck(OPS.linear_attn_forward.default, (q, k, v, *more, *options))
        _, *kept = OPS.linear_attn_forward(q, k, v, *more, *options)
        backward = (do, q, k, v, *more, *kept, *options, [True, True])
        opcheck(OPS.linear_attn_backward.default, backward)


@pytest.mark.parametrize("bounds", [[0], [0, 0, 0]], ids=str)
def test_no_packed_tokens(bounds):
    q, k, v, _ = tensors(torch.float32, None, (1, 2, 0, 0, 4, 6))
    bounds = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    count = torch.zeros(bounds.shape[0] - 1, device=DEVICE)
    more = (None, None, count, None, bounds)
    check_gradients(OPS.linear_attn.default, (q, k, v, *more, *OPTIONS["mean"]), 0, 1, 2)


def test_several_tiles_and_splits():
    for shape in ((1, 1, 3, 5, 140, 70), (1, 1, 600, 530, 4, 4)):
        q, k, v, _ = tensors(torch.float32, None, shape)
        opcheck(OPS.linear_attn.default, (q, k, v, *NONE, *OPTIONS["mean"]))


# The two halves.


def halves_inputs(kind, dtype, layout, normalizer="mean"):
    """The arguments of linear_attn_state, and those of linear_attn_apply without the state."""
    do, arguments, options = inputs(kind, dtype, layout, normalizer)
    q, k, v, weight, mask, count, table, _ = arguments
    feature_map, normalizer, rotary, _, eps = options
    count = torch.tensor([7.0], device=DEVICE) if count is None else count
    of_keys = (k, v, weight, mask, table, feature_map, rotary)
    return do, of_keys, (q, count, table, feature_map, normalizer, rotary, eps)


@each_halves_case
def test_state(kind, layout, dtype, normalizer):
    _, of_keys, _ = halves_inputs(kind, dtype, layout, normalizer)
    opcheck(OPS.linear_attn_state.default, of_keys)
    check_gradients(OPS.linear_attn_state.default, of_keys, 0, 1, 2)
    check_gradients(OPS.linear_attn_state.default, of_keys, 1)
    dstate = torch.randn_like(OPS.linear_attn_state(*of_keys))
    opcheck(OPS.linear_attn_state_backward.default, (dstate, *of_keys))
    strided = torch.stack((dstate, dstate), -1)[..., 0]
    opcheck(OPS.linear_attn_state_backward.default, (strided, *of_keys))


@each_halves_case
def test_apply(kind, layout, dtype, normalizer):
    do, of_keys, (q, *of_query) = halves_inputs(kind, dtype, layout, normalizer)
    state = OPS.linear_attn_state(*of_keys)
    arguments = (q, state, *of_query)
    opcheck(OPS.linear_attn_apply.default, arguments)
    check_gradients(OPS.linear_attn_apply.default, arguments, 0, 1)
    check_gradients(OPS.linear_attn_apply.default, arguments, 1)
    opcheck(OPS.linear_attn_apply_forward.default, arguments)
    _, inverse = OPS.linear_attn_apply_forward(*arguments)
    count, table, *options = of_query
    opcheck(OPS.linear_attn_apply_backward.default, (do, q, state, count, table, inverse, *options))


@each_empty
def test_empty_halves(shape):
    q, k, v, do = tensors(torch.float32, None, shape)
    weight, mask, count = keys_of(torch.float32, shape[0], 3, shape[3])
    for keys in ((None, None, None), (weight, mask, None)):
        check_gradients(OPS.linear_attn_state.default, (k, v, *keys, "elu1", "none"), 0, 1, 2)
    state = OPS.linear_attn_state(k, v, *keys, "elu1", "none")
    options = ("elu1", "mean", "none", 1e-6)
    check_gradients(OPS.linear_attn_apply.default, (q, state, count, None, *options), 0, 1)
    _, inverse = OPS.linear_attn_apply_forward(q, state, count, None, *options)
    backward = (do, q, state, count, None, inverse, *options)
    opcheck(OPS.linear_attn_apply_backward.default, backward)


# Focused linear attention.


def focused_inputs(kind, dtype, layout, shape=SHAPE):
    """do, then q, k, v, columns, key_mask, total, shift, power and eps."""
    q, k, v, do = tensors(dtype, layout, shape)
    B, H, _, M, K, _ = shape
    columns = 0.5 + torch.arange(float(H * K), device=DEVICE).view(H, K) / 8
    mask = total = shift = None
    if kind == "keys":
        _, mask, total = keys_of(dtype, B, H, M)
        shift = torch.arange(float(M * H * K), device=DEVICE).view(M, H, K).cos().to(dtype)
    return do, (q, k, v, columns, mask, total, shift, 3.0, 1e-6)


@each_focused_case
def test_focused_la(kind, layout, dtype):
    do, arguments = focused_inputs(kind, dtype, layout)
    opcheck(OPS.focused_la.default, arguments)
    check_gradients(OPS.focused_la.default, arguments, 0, 1, 2, 3)
    check_gradients(OPS.focused_la.default, arguments, 6 if kind == "keys" else 3)
    opcheck(OPS.focused_la_forward.default, arguments)
    _, *kept = OPS.focused_la_forward(*arguments)
    opcheck(OPS.focused_la_backward.default, (do, *arguments[:7], *kept, *arguments[7:]))


@each_empty
def test_empty_focused_la(shape):
    do, arguments = focused_inputs("keys", torch.float32, None, shape)
    check_gradients(OPS.focused_la.default, arguments, 0, 1, 2, 3, 6)
    opcheck(OPS.focused_la_forward.default, arguments)
    _, *kept = OPS.focused_la_forward(*arguments)
    opcheck(OPS.focused_la_backward.default, (do, *arguments[:7], *kept, *arguments[7:]))


# Fakes.


def assert_fakes_are_like_the_real_ones(compute, *arguments):
    """`compute` makes the same of fakes as of tensors: shapes, strides, dtypes and devices."""

    def described(*arguments):
        # Inference mode goes below autograd, straight to the implementation or the fake.
        with torch.inference_mode():
            return [(x.shape, x.stride(), x.dtype, x.device) for x in compute(*arguments)]

    real = described(*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        assert described(*fakes) == real


@each_layout
@pytest.mark.parametrize("kind", ["plain", "keys", "grouped", "packed with all"])
def test_fakes_of_linear_attn(kind, layout):
    do, arguments, options = inputs(kind, torch.float16, layout)

    def compute(do, *arguments):
        o = OPS.linear_attn(*arguments, *options)
        made = OPS.linear_attn_forward(*arguments, *options)
        gradients = OPS.linear_attn_backward(do, *arguments, *made[1:], *options, [True, True])
        some = OPS.linear_attn_backward(do, *arguments, *made[1:], *options, [True, False])
        return (o, *made, *gradients, *some)

    assert_fakes_are_like_the_real_ones(compute, do, *arguments)


@pytest.mark.parametrize("kind", ["plain", "packed with all"])
def test_fakes_of_more_features_than_channels(kind):
    do, arguments, options = inputs(kind, torch.float16, "token_major", normalizer="none")
    options = ("signed", *options[1:])
    # A table has a column for every feature.
    *arguments, table, cu_seqlens = arguments
    arguments = (*arguments, None if table is None else table.repeat(1, 1, 2), cu_seqlens)

    def compute(do, *arguments):
        made = OPS.linear_attn_forward(*arguments, *options)
        gradients = OPS.linear_attn_backward(do, *arguments, *made[1:], *options, [True, True])
        return (*made, *gradients)

    assert_fakes_are_like_the_real_ones(compute, do, *arguments)


@each_layout
@pytest.mark.parametrize("kind", ["plain", "keys", "grouped"])
def test_fakes_of_the_halves(kind, layout):
    do, of_keys, of_query = halves_inputs(kind, torch.float16, layout)
    q, count, _, *options = of_query

    def compute(do, q, count, *of_keys):
        state = OPS.linear_attn_state(*of_keys)
        o = OPS.linear_attn_apply(q, state, count, of_keys[4], *options)
        o2, inverse = OPS.linear_attn_apply_forward(q, state, count, of_keys[4], *options)
        gradients = OPS.linear_attn_apply_backward(
            do, q, state, count, of_keys[4], inverse, *options
        )
        of_state = OPS.linear_attn_state_backward(gradients[1], *of_keys)
        return (state, o, o2, inverse, *gradients, *of_state)

    assert_fakes_are_like_the_real_ones(compute, do, q, count, *of_keys)


@each_layout
@pytest.mark.parametrize("kind", ["plain", "keys"])
def test_fakes_of_focused_la(kind, layout):
    do, arguments = focused_inputs(kind, torch.float16, layout)

    def compute(do, *arguments):
        made = OPS.focused_la_forward(*arguments)
        gradients = OPS.focused_la_backward(do, *arguments[:7], *made[1:], *arguments[7:])
        return (OPS.focused_la(*arguments), *made, *gradients)

    assert_fakes_are_like_the_real_ones(compute, do, *arguments)


# The public functions are these operators.


@pytest.mark.parametrize(
    "variant, options",
    [
        (MEAN, ("elu1", "mean", "none", 1.0, 1e-4)),
        (SUM, ("relu", "sum", "none", 1.0, 1e-15)),
        (SIMPLE, ("none", "none", "none", 0.5, 0.0)),
        (SIMPLE._replace(scale=3.0), ("none", "none", "none", 3.0, 0.0)),
    ],
)
def test_public_functions_are_this_operator(variant, options):
    q, k, v, do = tensors(torch.float32, None)
    expected = run(lambda *x: OPS.linear_attn(*x, *NONE, *options), q, k, v, do)
    for x, y in zip(run(variant, q, k, v, do), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("interleaved", [True, False])
def test_public_options_are_those_of_the_operator(interleaved):
    q, k, v, do = tensors(torch.float32, None, (1, 2, 7, 7, 4, 6))
    weight, mask, count = keys_of(torch.float32)
    cos, sin = torch.rand(2, 2, 7, 2, device=DEVICE)
    rotary = fbila.Rotary(cos, sin, interleaved)
    table = torch.stack((cos, sin), -1).flatten(-2) if interleaved else torch.cat((cos, sin), -1)
    order = "interleaved" if interleaved else "halves"

    def public(q, k, v):
        keys = {"key_weight": weight, "key_mask": mask.bool()}
        return fbila.linear_attn(q, k, v, feature_map="elu1", rotary=rotary, impl="triton", **keys)

    def op(q, k, v):
        weighed = weight * mask[:, None]
        options = ("elu1", "mean", order, 1.0, 1e-6)
        return OPS.linear_attn(q, k, v, weighed, mask, count, table, None, *options)

    for x, y in zip(run(public, q, k, v, do), run(op, q, k, v, do), strict=True):
        assert torch.equal(x, y)
