"""FLatten's layer computes the published formula, and takes the published weights."""

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

from fbila.layers import FocusedLinearAttention, focused

SHARED = {
    "scale": (1, 1, 16),
    "proj.weight": (16, 16),
    "proj.bias": (16,),
    "dwc.weight": (8, 1, 5, 5),
    "dwc.bias": (8,),
}
SEPARATE = {"q.weight": (16, 16), "q.bias": (16,), "kv.weight": (32, 16), "kv.bias": (32,)}
REDUCED = {
    "sr.weight": (16, 16, 2, 2),
    "sr.bias": (16,),
    "norm.weight": (16,),
    "norm.bias": (16,),
}
# Of models/flatten_swin.py with windows of 6 x 6, and of flatten_pvt.py with 36 patches.
OFFICIAL = {
    None: {
        **SHARED,
        "positional_encoding": (1, 36, 16),
        "qkv.weight": (48, 16),
        "qkv.bias": (48,),
    },
    1: {**SHARED, **SEPARATE, "positional_encoding": (1, 36, 16)},
    2: {**SHARED, **SEPARATE, **REDUCED, "positional_encoding": (1, 9, 16)},
}


def by_hand(p, x, H, W, heads, sr=1, power=3):
    """The published formula, from the parameters `p` alone and with an explicit (N, M) matrix."""
    b, n, c = x.shape
    d = c // heads
    y = x
    if sr > 1:
        rows, columns = H // sr, W // sr
        y = x.view(b, H, W, c)[:, : rows * sr, : columns * sr]
        y = y.reshape(b, rows, sr, columns, sr, c)
        y = torch.einsum("brsuto,zost->bruz", y, p["sr.weight"]).flatten(1, 2) + p["sr.bias"]
        y = F.layer_norm(y, (c,), p["norm.weight"], p["norm.bias"])
    if "qkv.weight" in p:
        (w_q, w_k, w_v), (b_q, b_k, b_v) = p["qkv.weight"].chunk(3), p["qkv.bias"].chunk(3)
    else:
        w_q, b_q = p["q.weight"], p["q.bias"]
        (w_k, w_v), (b_k, b_v) = p["kv.weight"].chunk(2), p["kv.bias"].chunk(2)
    q, k, v = x @ w_q.T + b_q, y @ w_k.T + b_k + p["positional_encoding"], y @ w_v.T + b_v

    def focus(t):
        t = (t.clamp(min=0) + 1e-6) / (1 + p["scale"].exp()).log()
        powers = t**power
        return t.norm(dim=-1, keepdim=True) * powers / powers.norm(dim=-1, keepdim=True)

    q, k, per_head = (t.unflatten(-1, (heads, d)) for t in (focus(q), focus(k), v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    weights = scores / scores.shape[-1] / (scores.mean(-1, keepdim=True) + 1e-6)
    out = torch.einsum("bhij,bjhd->bihd", weights, per_head)
    # The convolution tap by tap, on all heads alike.
    if sr > 1:
        v = F.interpolate(v.mT, size=n, mode="linear", align_corners=False).mT
    v = F.pad(v.reshape(b, H, W, heads, d), (0, 0, 0, 0, 2, 2, 2, 2))
    local = p["dwc.bias"].expand(b, H, W, heads, d)
    for i in range(5):
        for j in range(5):
            local = local + v[:, i : i + H, j : j + W] * p["dwc.weight"][:, 0, i, j]
    out = (out + local.flatten(1, 2)).flatten(2)
    return out @ p["proj.weight"].T + p["proj.bias"]


def make(H, W, heads=2, sr=None, **options):
    torch.manual_seed(0)
    layer = FocusedLinearAttention(
        16, heads, qkv_bias=True, grid_size=(H, W), sr_ratio=sr, **options
    )
    return layer, torch.randn(2, H * W, 16)


@pytest.mark.parametrize(
    ("H", "W", "heads", "sr"),
    [(6, 6, 2, None), (5, 7, 4, None), (3, 8, 2, 1), (6, 4, 2, 2), (7, 10, 1, 3), (1, 5, 2, None)],
)
def test_output_and_gradients(H, W, heads, sr):
    layer, x = make(H, W, heads, sr)
    assert_formula(layer, lambda p, x, H, W: by_hand(p, x, H, W, heads, sr or 1), x, H, W)


def test_focusing_factor():
    layer, x = make(4, 3, focusing_factor=2)
    assert_formula(layer, lambda p, x, H, W: by_hand(p, x, H, W, 2, power=2), x, 4, 3)


@pytest.mark.parametrize("sr", [None, 1, 2])
def test_parameters_bear_the_official_names(sr):
    layer = FocusedLinearAttention(16, 2, True, grid_size=6, sr_ratio=sr)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == OFFICIAL[sr]


def test_a_square_needs_no_size():
    layer, x = make(4, 4)
    assert torch.equal(layer(x), layer(x, 4, 4))


@pytest.mark.parametrize(("native", "size"), [((4, 3), (5, 3)), ((1, 4), (3, 2)), ((3, 5), (5, 3))])
def test_positions_for_another_grid_are_those_of_timm(native, size):
    timm_layers = pytest.importorskip("timm.layers")
    layer, _ = make(*native)

    def resized(p, x, H, W):
        positions = timm_layers.resample_abs_pos_embed(
            p["positional_encoding"], new_size=size, old_size=native, num_prefix_tokens=0
        )
        return by_hand({**p, "positional_encoding": positions}, x, H, W, 2)

    randomize(layer)
    x = torch.randn(2, size[0] * size[1], 16)
    expected = resized(dict(layer.named_parameters()), x, *size)
    torch.testing.assert_close(layer(x, *size), expected, rtol=1e-5, atol=1e-5)


def test_no_copy_between_the_projection_and_the_op(monkeypatch):
    layer, x = make(3, 5)
    capture, seen = Capture(focused.focused_la), {}
    monkeypatch.setattr(focused, "focused_la", capture)
    layer.qkv.register_forward_hook(lambda _, __, output: seen.update(qkv=output))
    layer(x, 3, 5)
    q, k, v = capture.inputs
    assert memory_of(q) == memory_of(k) == memory_of(v) == memory_of(seen["qkv"])
    assert q.stride() == k.stride() == v.stride() == (15 * 48, 8, 48, 1)


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


def test_dropout_after_the_projection():
    layer, x = make(2, 2, proj_drop=1.0)
    assert not layer(x).any()
    assert layer.eval()(x).all()


def test_device_and_dtype_reach_every_parameter():
    layer = FocusedLinearAttention(
        16, 2, grid_size=4, sr_ratio=2, device="meta", dtype=torch.float16
    )
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim, got dim=16 and num_heads=3"),
        ({"attn_drop": 0.1}, "attn_drop=0.1: linear attention has no attention map"),
        ({"kernel_size": 4}, "kernel_size must be odd.*kernel_size=4"),
        ({"sr_ratio": 0}, "sr_ratio must be at least 1, or None, got sr_ratio=0"),
        ({"sr_ratio": 7}, "at least sr_ratio=7.*got H=6 and W=6"),
        ({"grid_size": (6, 0)}, r"grid_size must be positive, got grid_size=\(6, 0\)"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FocusedLinearAttention(16, **{"num_heads": 2, "grid_size": 6, **settings})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((3, 5), "got H=3 and W=5 for 12 tokens"),
        ((), "got H=3 and W=3 for 12 tokens; leave both out for a square alone"),
        ((3,), "got H=3 and W=None for 12 tokens"),
        ((1, 12), "at least sr_ratio=2.*got H=1 and W=12"),
    ],
)
def test_grids_that_do_not_fit(size, message):
    layer, _ = make(6, 6, sr=2)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(1, 12, 16), *size)
