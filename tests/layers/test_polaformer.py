"""PolaFormer's layer computes the published formula, and takes the published weights."""

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

from fbila.layers import PolaLinearAttention, polaformer

SHARED = {
    "scale": (1, 1, 16),
    "power": (1, 2, 1, 8),
    "proj.weight": (16, 16),
    "proj.bias": (16,),
    "dwc.weight": (8, 1, 5, 5),
    "dwc.bias": (8,),
}
SEPARATE = {"qg.weight": (32, 16), "qg.bias": (32,), "kv.weight": (32, 16), "kv.bias": (32,)}
REDUCED = {
    "sr.weight": (16, 16, 2, 2),
    "sr.bias": (16,),
    "norm.weight": (16,),
    "norm.bias": (16,),
}
# Of models/pola_swin.py with windows of 6 x 6, and of pola_pvt.py with 36 patches.
OFFICIAL = {
    None: {
        **SHARED,
        "positional_encoding": (1, 36, 16),
        "qkvg.weight": (64, 16),
        "qkvg.bias": (64,),
    },
    1: {**SHARED, **SEPARATE, "positional_encoding": (1, 36, 16)},
    2: {**SHARED, **SEPARATE, **REDUCED, "positional_encoding": (1, 9, 16)},
}


def by_hand(p, x, H, W, heads, sr=1, alpha=4):
    """The published formula, from the parameters `p` alone and with explicit (N, M) matrices."""
    b, n, c = x.shape
    d = c // heads
    y = x
    if sr > 1:
        image = x.mT.reshape(b, c, H, W)
        y = F.conv2d(image, p["sr.weight"], p["sr.bias"], stride=sr).flatten(2).mT
        y = F.layer_norm(y, (c,), p["norm.weight"], p["norm.bias"])
    if "qkvg.weight" in p:
        q, k, v, g = (x @ p["qkvg.weight"].T + p["qkvg.bias"]).chunk(4, -1)
    else:
        q, g = (x @ p["qg.weight"].T + p["qg.bias"]).chunk(2, -1)
        k, v = (y @ p["kv.weight"].T + p["kv.bias"]).chunk(2, -1)
    k = k + p["positional_encoding"]
    q, k = (t / (1 + p["scale"].exp()).log() for t in (q, k))
    q, k, per_head = (t.unflatten(-1, (heads, d)).transpose(1, 2) for t in (q, k, v))
    power = 1 + alpha / (1 + (-p["power"]).exp())
    (q_pos, q_neg), (k_pos, k_neg) = (
        (t.clamp(min=0) ** power, (-t).clamp(min=0) ** power) for t in (q, k)
    )

    def attend(features, values):
        scores = features @ torch.cat((k_pos, k_neg), -1).mT
        return scores @ values / scores.shape[-1] / (scores.mean(-1, keepdim=True) + 1e-6)

    first, second = per_head.chunk(2, -1)
    same = attend(torch.cat((q_pos, q_neg), -1), first)
    opposite = attend(torch.cat((q_neg, q_pos), -1), second)
    out = torch.cat((same, opposite), -1).transpose(1, 2).flatten(2)
    if sr > 1:
        v = F.interpolate(v.mT, size=n, mode="linear", align_corners=False).mT
    # Heads as batch items, with one head's kernels.
    image = v.reshape(b, n, heads, d).permute(0, 2, 3, 1).reshape(b * heads, d, H, W)
    local = F.conv2d(image, p["dwc.weight"], p["dwc.bias"], padding=2, groups=d)
    out = (out + local.reshape(b, c, n).mT) * g
    return out @ p["proj.weight"].T + p["proj.bias"]


def make(H, W, heads=2, sr=None, **options):
    torch.manual_seed(0)
    layer = PolaLinearAttention(16, heads, qkv_bias=True, grid_size=(H, W), sr_ratio=sr, **options)
    return layer, torch.randn(2, H * W, 16)


@pytest.mark.parametrize(
    ("H", "W", "heads", "sr"),
    [(6, 6, 2, None), (5, 7, 4, None), (3, 8, 8, 1), (6, 4, 2, 2), (7, 10, 1, 3), (1, 5, 2, None)],
)
def test_output_and_gradients(H, W, heads, sr):
    layer, x = make(H, W, heads, sr)
    assert_formula(layer, lambda p, x, H, W: by_hand(p, x, H, W, heads, sr or 1), x, H, W)


def test_alpha_bounds_the_powers():
    layer, x = make(4, 3, alpha=2)
    assert_formula(layer, lambda p, x, H, W: by_hand(p, x, H, W, 2, alpha=2), x, 4, 3)


@pytest.mark.parametrize("sr", [None, 1, 2])
def test_parameters_bear_the_official_names(sr):
    layer = PolaLinearAttention(16, 2, True, grid_size=6, sr_ratio=sr)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == OFFICIAL[sr]


def test_another_grid_has_resized_positions():
    timm_layers = pytest.importorskip("timm.layers")
    layer, _ = make(4, 3)
    randomize(layer)
    x = torch.randn(2, 35, 16)
    resized = timm_layers.resample_abs_pos_embed(
        layer.positional_encoding, new_size=[5, 7], old_size=[4, 3], num_prefix_tokens=0
    )
    expected = by_hand(
        {**dict(layer.named_parameters()), "positional_encoding": resized}, x, 5, 7, 2
    )
    torch.testing.assert_close(layer(x, 5, 7), expected, rtol=1e-5, atol=1e-5)


def test_no_copy_of_the_values(monkeypatch):
    layer, x = make(3, 5)
    capture, seen = Capture(polaformer.linear_attn), {}
    monkeypatch.setattr(polaformer, "linear_attn", capture)
    layer.qkvg.register_forward_hook(lambda _, __, output: seen.update(qkvg=output))
    layer(x, 3, 5)
    q, k, v = capture.inputs
    assert memory_of(v) == memory_of(seen["qkvg"])
    assert v.stride() == (15 * 64, 8, 64, 1)
    # Token-major as the projection is, and as wide: nothing has been made contiguous.
    assert q.stride() == k.stride() == (15 * 16, 8, 16, 1)


@pytest.mark.parametrize("sr", [None, 2])
def test_with_the_kernels(sr, monkeypatch):
    layer, x = make(4, 5, sr=sr)
    assert_kernels_agree(monkeypatch, layer, x, 4, 5)


@pytest.mark.parametrize("sr", [None, 2])
def test_serves(sr):
    layer, x = make(4, 6, sr=sr)
    assert_serves(layer, x, 4, 6)


@pytest.mark.parametrize("sizes", [[(4, 6)], [(6, 8), (9, 11)]], ids=["native", "resized"])
def test_compiles_for_any_grid(sizes):
    layer, _ = make(4, 6, sr=2)
    assert_compiles(layer, *((torch.randn(2, H * W, 16), H, W) for H, W in sizes))


def test_in_half_precision():
    layer, x = make(4, 6, sr=2)
    randomize(layer)
    expected = layer(x, 4, 6)
    for dtype in (torch.bfloat16, torch.float16):
        output = layer.to(dtype)(x.to(dtype), 4, 6)
        assert output.dtype == dtype
        assert (output - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


def test_powers_are_rounded_once(monkeypatch):
    layer, _ = make(3, 5, dtype=torch.bfloat16)
    randomize(layer)
    capture = Capture(polaformer.linear_attn)
    monkeypatch.setattr(polaformer, "linear_attn", capture)
    q = 3 * torch.rand(2, 2, 15, 8).bfloat16()
    layer.attend(q, q, q)
    scale = F.softplus(layer.scale.double()).view(2, 1, 8)
    exact = (q / scale) ** (1 + 4 * layer.power.double().sigmoid())
    torch.testing.assert_close(capture.inputs[0].double(), exact, rtol=2**-8, atol=0)


def test_powers_beyond_float16_stay_finite():
    layer, x = make(3, 5, dtype=torch.float16)
    output = layer(100 * x.half(), 3, 5)
    output.float().sum().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_query_of_zeros_has_a_gradient():
    layer, x = make(3, 5)
    torch.nn.init.zeros_(layer.qkvg.weight)
    torch.nn.init.zeros_(layer.qkvg.bias)
    torch.nn.init.constant_(layer.power, -3)  # powers near 1, whose second derivatives are not 0
    layer(x, 3, 5).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_dropout_after_the_projection():
    layer, x = make(2, 2, proj_drop=1.0)
    assert not layer(x).any()
    assert layer.eval()(x).all()


def test_device_and_dtype_reach_every_parameter():
    layer = PolaLinearAttention(16, 2, grid_size=4, sr_ratio=2, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim, got dim=16 and num_heads=3"),
        ({"num_heads": 16}, "must be even.*got dim=16 and num_heads=16"),
        ({"attn_drop": 0.1}, "attn_drop=0.1: linear attention has no attention map"),
        ({"kernel_size": 4}, "kernel_size must be odd.*kernel_size=4"),
        ({"sr_ratio": 0}, "sr_ratio must be at least 1, or None, got sr_ratio=0"),
        ({"sr_ratio": 7}, "at least sr_ratio=7.*got H=6 and W=6"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PolaLinearAttention(16, **{"num_heads": 2, "grid_size": 6, **settings})


def test_grids_that_do_not_fit():
    layer, _ = make(6, 6, sr=2)
    with pytest.raises(ValueError, match="got H=3 and W=5 for 12 tokens"):
        layer(torch.randn(1, 12, 16), 3, 5)
