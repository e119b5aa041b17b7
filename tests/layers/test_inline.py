"""InLine's layer computes the published formula, and takes the published weights."""

import pytest
import torch
import torch.nn.functional as F
from vision_contracts import (
    Capture,
    assert_compiles,
    assert_formula,
    assert_kernels_agree,
    assert_serves,
    memory_of,
    randomize,
)

from fbila.layers import InLineAttention, inline

SHARED = {
    "proj.weight": (16, 16),
    "proj.bias": (16,),
    "residual.0.weight": (16, 8, 1),
    "residual.0.bias": (16,),
    "residual.2.weight": (144, 8, 1),
    "residual.2.bias": (144,),
}
# Of models/inline_deit.py and inline_swin.py, and of inline_pvt.py.
OFFICIAL = {
    None: {**SHARED, "qkv.weight": (48, 16), "qkv.bias": (48,)},
    1: {
        **SHARED,
        "q.weight": (16, 16),
        "q.bias": (16,),
        "kv.weight": (32, 16),
        "kv.bias": (32,),
    },
}
MAPS = {
    "identity": lambda t: t,
    "relu": lambda t: t.clamp(min=0),
    "leakyrelu": lambda t: torch.maximum(t, 0.01 * t),
    "exp": lambda t: (0.2 * t).exp(),
}


def by_hand(p, x, H, W, heads, prefix=0, kernel="identity"):
    """Equation 5 of the paper, from the parameters `p` alone and with the (N, N) matrix."""
    b, n, c = x.shape
    d = c // heads
    if "qkv.weight" in p:
        q, k, v = (x @ p["qkv.weight"].T + p["qkv.bias"]).chunk(3, -1)
    else:
        q = x @ p["q.weight"].T + p["q.bias"]
        k, v = (x @ p["kv.weight"].T + p["kv.bias"]).chunk(2, -1)
    q, k, per_head = (t.unflatten(-1, (heads, d)) for t in (MAPS[kernel](q), MAPS[kernel](k), v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / d**0.5 / n
    weights = scores - scores.mean(-1, keepdim=True) + 1 / n
    out = torch.einsum("bhij,bjhd->bihd", weights, per_head).flatten(2)

    def per_head_linear(t, name):
        weight = p[f"{name}.weight"].view(heads, -1, d)
        return torch.einsum("bhi,hoi->bho", t, weight) + p[f"{name}.bias"].view(heads, -1)

    hidden = F.gelu(per_head_linear(x.mean(1).view(b, heads, d), "residual.0"))
    kernels = per_head_linear(hidden, "residual.2").reshape(b, 1, 1, c, 9)
    # The convolution tap by tap.
    image = F.pad(v[:, prefix:].reshape(b, H, W, c), (0, 0, 1, 1, 1, 1))
    taps = [image[:, i : i + H, j : j + W] for i in range(3) for j in range(3)]
    local = sum(tap * kernels[..., i] for i, tap in enumerate(taps))
    out = out + F.pad(local.reshape(b, H * W, c), (0, 0, prefix, 0))
    return out @ p["proj.weight"].T + p["proj.bias"]


def make(H, W, heads=2, prefix=0, **options):
    torch.manual_seed(0)
    layer = InLineAttention(16, heads, qkv_bias=True, num_prefix_tokens=prefix, **options)
    return layer, torch.randn(2, prefix + H * W, 16)


@pytest.mark.parametrize(
    ("H", "W", "heads", "prefix", "sr"),
    [(6, 6, 2, 0, None), (5, 7, 4, 0, 1), (3, 8, 1, 1, None), (4, 4, 16, 2, None), (1, 5, 2, 0, 1)],
)
def test_output_and_gradients(H, W, heads, prefix, sr):
    layer, x = make(H, W, heads, prefix, sr_ratio=sr)
    assert_formula(layer, lambda p, x, H, W: by_hand(p, x, H, W, heads, prefix), x, H, W)


@pytest.mark.parametrize("kernel", MAPS)
def test_feature_maps(kernel):
    layer, x = make(4, 3, kernel_func=kernel)
    assert_formula(layer, lambda p, x, H, W: by_hand(p, x, H, W, 2, kernel=kernel), x, 4, 3)


@pytest.mark.parametrize("sr", [None, 1])
def test_parameters_bear_the_official_names(sr):
    layer = InLineAttention(16, 2, True, sr_ratio=sr)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == OFFICIAL[sr]


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_square_needs_no_size(prefix):
    layer, x = make(4, 4, prefix=prefix)
    assert torch.equal(layer(x), layer(x, 4, 4))


def test_no_copy_between_the_projection_and_the_op(monkeypatch):
    layer, x = make(3, 5)
    capture, seen = Capture(inline.centred_la), {}
    monkeypatch.setattr(inline, "centred_la", capture)
    layer.qkv.register_forward_hook(lambda _, __, output: seen.update(qkv=output))
    layer(x, 3, 5)
    for t in capture.inputs[:3]:
        assert memory_of(t) == memory_of(seen["qkv"])
        assert t.stride() == (15 * 48, 8, 48, 1)


@pytest.mark.parametrize("kernel", ["identity", "exp"])
def test_with_the_kernels(kernel, monkeypatch):
    layer, x = make(4, 5, prefix=1, kernel_func=kernel)
    assert_kernels_agree(monkeypatch, layer, x, 4, 5)


@pytest.mark.parametrize("prefix", [0, 1])
def test_serves(prefix):
    layer, x = make(4, 6, prefix=prefix)
    assert_serves(layer, x, 4, 6)


def test_compiles_for_any_grid():
    layer, _ = make(4, 6)
    assert_compiles(layer, *((torch.randn(2, H * W, 16), H, W) for H, W in ((4, 6), (5, 8))))


def test_in_half_precision():
    layer, x = make(4, 6)
    randomize(layer)
    expected = layer(x, 4, 6)
    for dtype in (torch.bfloat16, torch.float16):
        output = layer.to(dtype)(x.to(dtype), 4, 6)
        assert output.dtype == dtype
        assert (output - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


def test_dropout_after_the_projection():
    layer, x = make(2, 2, proj_drop=1.0)
    assert not layer(x).any()
    assert layer.eval()(x).all()


def test_device_and_dtype_reach_every_parameter():
    layer = InLineAttention(16, 2, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim, got dim=16 and num_heads=3"),
        ({"attn_drop": 0.1}, "attn_drop=0.1: linear attention has no attention map"),
        ({"sr_ratio": 2}, "sr_ratio must be None or 1.*got sr_ratio=2"),
        ({"num_prefix_tokens": -1}, "must not be negative, got num_prefix_tokens=-1"),
        ({"kernel_func": "elu"}, "kernel_func must be one of .*, got 'elu'"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InLineAttention(16, **{"num_heads": 2, **settings})


def test_grids_that_do_not_fit():
    layer, x = make(3, 4, prefix=1)
    with pytest.raises(ValueError, match="got H=3 and W=5 for 12 tokens"):
        layer(x, 3, 5)
