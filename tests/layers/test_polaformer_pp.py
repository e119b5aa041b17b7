"""PolaFormer++'s layer computes the official formula, and takes the official weights."""

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

from fbila.layers import PolaPPAttention, polaformer_pp

# Of polaformer++/models/pola.py and downstream/dit/models.py.
OFFICIAL = {
    "qkvg.weight": (64, 16),
    "qkvg.bias": (64,),
    "lepe.weight": (16, 1, 5, 5),
    "lepe.bias": (16,),
    "proj.weight": (16, 16),
    "proj.bias": (16,),
    "s1": (1, 2, 1, 16),
    "s2": (1, 2, 1, 16),
}


def turn(t, H, W):
    """`(..., H * W, 2 d)` features as d complex numbers, the first half turned by row."""
    half = t.shape[-1] // 4
    step = torch.arange(half, dtype=torch.float64) / max(half - 1, 1)
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    angles = [place.reshape(-1, 1) * 10000.0**-step for place in (rows, columns)]
    angle = torch.cat(angles, -1)
    pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)
    return torch.view_as_real(turned).flatten(-2)


def by_hand(p, x, H, W, heads, rotary=True):
    """The official formula, from the parameters `p` alone and with explicit (N, N) matrices."""
    b, n, c = x.shape
    q, k, v, g = (x @ p["qkvg.weight"].T + p["qkvg.bias"]).chunk(4, -1)
    q, k, per_head = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    s1, s2 = (1 / (1 + (-p[name]).exp()) for name in ("s1", "s2"))

    def parts(t):
        return torch.cat((t.clamp(min=0), (-t).clamp(min=0)), -1)

    keys = parts(k).exp() - 1
    turned = (lambda t: turn(t, H, W)) if rotary else (lambda t: t)

    def attend(features, values):
        denominator = (features @ keys.mT).mean(-1, keepdim=True) + 1e-6
        return turned(features) @ turned(keys).mT @ values / n / denominator

    first, second = per_head.chunk(2, -1)
    same = attend((parts(q) * s1).exp() - 1, first)
    opposite = attend((parts(-q) * s2).exp() - 1, second)
    out = torch.cat((same, opposite), -1).transpose(1, 2).flatten(2)
    local = F.conv2d(
        v.mT.reshape(b, c, H, W), p["lepe.weight"], p["lepe.bias"], padding=2, groups=c
    )
    return ((out + local.flatten(2).mT) * g) @ p["proj.weight"].T + p["proj.bias"]


def make(H, W, heads=2, **options):
    torch.manual_seed(0)
    return PolaPPAttention(16, heads, **options), torch.randn(2, H * W, 16)


@pytest.mark.parametrize(("H", "W", "heads"), [(6, 6, 2), (5, 7, 4), (8, 3, 1), (1, 5, 8)])
@pytest.mark.parametrize("rotary", [True, False])
def test_output_and_gradients(H, W, heads, rotary):
    layer, x = make(H, W, heads, rotary=rotary)
    assert_formula(layer, lambda p, x, H, W: by_hand(p, x, H, W, heads, rotary), x, H, W)


@pytest.mark.parametrize("rotary", [True, False])
def test_parameters_bear_the_official_names(rotary):
    layer = PolaPPAttention(16, 2, rotary=rotary)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == OFFICIAL


def test_without_a_bias():
    layer = PolaPPAttention(16, 2, qkv_bias=False)
    assert set(layer.state_dict()) == set(OFFICIAL) - {"qkvg.bias"}


def test_tables_made_once_serve_several_layers():
    layer, x = make(3, 5)
    randomize(layer)
    expected, tables = layer(x, 3, 5), layer.rope(3, 5, x)
    layer.rope = None
    assert torch.equal(layer(x, 3, 5, tables), expected)
    assert not torch.allclose(layer(x, 3, 5), expected)


def test_no_copy_of_the_values(monkeypatch):
    layer, x = make(3, 5)
    capture, seen = Capture(polaformer_pp.linear_attn), {}
    monkeypatch.setattr(polaformer_pp, "linear_attn", capture)
    layer.qkvg.register_forward_hook(lambda _, __, output: seen.update(qkvg=output))
    layer(x, 3, 5)
    q, k, v = capture.inputs
    assert memory_of(v) == memory_of(seen["qkvg"])
    assert v.stride() == (15 * 64, 8, 64, 1)
    # Token-major as the projection is, and as wide: nothing has been made contiguous.
    assert q.stride() == k.stride() == (15 * 16, 8, 16, 1)


@pytest.mark.parametrize("rotary", [True, False])
def test_with_the_kernels(rotary, monkeypatch):
    layer, x = make(4, 5, rotary=rotary)
    assert_kernels_agree(monkeypatch, layer, x, 4, 5)


def test_serves():
    layer, x = make(4, 6)
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


def test_features_are_rounded_once():
    x = 5 * torch.rand(2, 2, 15, 8).bfloat16()
    sharpness = torch.randn(1, 2, 1, 16).bfloat16()
    exact = torch.expm1(x * sharpness.double().sigmoid()[..., :8])
    actual = polaformer_pp.spikes(x, sharpness)
    torch.testing.assert_close(actual.double(), exact, rtol=2**-8, atol=0)


def test_features_beyond_float16_stay_finite():
    layer, x = make(3, 5, dtype=torch.float16)
    output = layer(100 * x.half(), 3, 5)
    # So little that gradients of weights do not leave the range by themselves.
    (output.float().sum() / 1000).backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_small_features_keep_their_digits():
    x = torch.full((1, 1, 1, 2), 1e-6, dtype=torch.float32)
    torch.testing.assert_close(polaformer_pp.spikes(x), x, rtol=1e-6, atol=0)


def test_device_and_dtype_reach_every_parameter():
    layer = PolaPPAttention(16, 2, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (3, "num_heads must divide dim, got dim=16 and num_heads=3"),
        (16, "must be even.*got dim=16 and num_heads=16"),
    ],
)
def test_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        PolaPPAttention(16, heads)


def test_grids_that_do_not_fit():
    layer, _ = make(4, 3)
    with pytest.raises(ValueError, match="got H=3 and W=5 for 12 tokens"):
        layer(torch.randn(1, 12, 16), 3, 5)
