"""Each class computes its formula, held to a transcription with an explicit (N, N) matrix."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from timm.layers import Attention, AttentionRope, create_rope_embed
from timm.models.eva import EvaAttention
from torch import nn

from fbila.adapters import AdapterError
from fbila.adapters.shared import over
from fbila.adapters.timm import LinearAttention
from fbila.adapters.timm import rope as timm_rope
from fbila.adapters.timm.attention import LINEAR

B, N, C, H = 2, 11, 32, 4

VARIANTS = {
    "plain": (Attention, {}),
    "biases": (Attention, {"qkv_bias": True, "proj_bias": False}),
    "norms": (Attention, {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm}),
    "gated": (Attention, {"gated": True, "qkv_bias": True}),
    "widths": (Attention, {"attn_head_dim": 6, "dim_out": 20}),
    "rope": (AttentionRope, {}),
    "rope, split": (AttentionRope, {"qkv_fused": False, "attn_head_dim": 10}),
    "rope, grouped": (AttentionRope, {"qkv_fused": False, "num_kv_heads": 2, "gated": True}),
    "rope, halves": (AttentionRope, {"rotate_half": True, "num_prefix_tokens": 5}),
    "rope, norms": (
        AttentionRope,
        {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm, "num_prefix_tokens": 0},
    ),
    "eva": (EvaAttention, {"scale_norm": False}),
    "eva, separate bias": (EvaAttention, {"scale_norm": False, "qkv_bias_separate": True}),
    "eva, no bias": (EvaAttention, {"scale_norm": False, "qkv_bias": False, "gated": True}),
    "eva, split": (EvaAttention, {"qkv_fused": False, "norm_layer": nn.LayerNorm}),
    "eva, norms": (EvaAttention, {"qk_norm": True, "norm_layer": nn.LayerNorm}),
    "eva, halves": (EvaAttention, {"scale_norm": False, "rotate_half": True}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
with_rope = pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v][0] != Attention])


def layers(variant: str, feature_map: str = "elu1") -> tuple[nn.Module, nn.Module]:
    """timm's layer in float64, and the linear one over its parameters."""
    kind, options = VARIANTS[variant]
    torch.manual_seed(0)
    original = kind(C, num_heads=H, **options).double()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    original.to(DEVICE)
    return original, over(original, LINEAR[kind], feature_map=feature_map)


def tokens() -> torch.Tensor:
    x = torch.randn(B, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE)


def angles(layer: nn.Module, *front: int) -> torch.Tensor:
    """`(*front, N - prefix, K / 2)`."""
    size = (*front, N - layer.num_prefix_tokens, layer.head_dim // 2)
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.rand(size, dtype=torch.float64, generator=generator).to(DEVICE)


def table(layer: nn.Module, turns: torch.Tensor) -> torch.Tensor:
    """The angles as timm passes them."""
    repeated = turns.repeat_interleave(2, -1)
    turns = torch.cat((turns, turns), -1) if layer.rotate_half else repeated
    return torch.cat((turns.sin(), turns.cos()), -1)


def projected(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """q, k and v `(B, H, N, K)` by one weight each."""
    if layer.qkv is None:
        maps = [layer.q_proj, layer.k_proj, layer.v_proj]
        parts = [F.linear(x, m.weight, m.bias) for m in maps]
    else:
        biases = [None] * 3 if layer.qkv.bias is None else layer.qkv.bias.chunk(3)
        if getattr(layer, "q_bias", None) is not None:
            biases = [layer.q_bias, None, layer.v_bias]
        weights = layer.qkv.weight.chunk(3)
        parts = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    q, k, v = (part.reshape(B, N, -1, layer.head_dim).transpose(1, 2) for part in parts)
    groups = q.shape[1] // k.shape[1]
    q, k = layer.q_norm(q), layer.k_norm(k)
    return [q, *(part.repeat_interleave(groups, 1) for part in (k, v))]


def turned(layer: nn.Module, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Pairs of channels as complex numbers, those of the prefix times 1."""
    prefix, body = x.split([layer.num_prefix_tokens, N - layer.num_prefix_tokens], 2)
    if layer.rotate_half:
        pairs = torch.complex(*body.chunk(2, -1))
    else:
        pairs = torch.complex(body[..., 0::2], body[..., 1::2])
    pairs = pairs * torch.polar(torch.ones_like(turns), turns)
    if layer.rotate_half:
        body = torch.cat((pairs.real, pairs.imag), -1)
    else:
        body = torch.view_as_real(pairs).flatten(-2)
    return torch.cat((prefix, body), 2)


def by_hand(layer: nn.Module, x, feature_map=None, turns=None, bias=None) -> torch.Tensor:
    """`bias` `(B, N)` is what softmax would add to the logits of each key."""
    q, k, v = projected(layer, x)
    phi = feature_map or (lambda t: torch.where(t > 0, t + 1, t.exp()))
    q, k = phi(q), phi(k)
    weight = x.new_ones(B, N) if bias is None else bias.exp()
    there = (weight > 0).sum(-1)[:, None, None, None]
    denominator = ((q @ k.mT) * weight[:, None, None]).sum(-1, keepdim=True) / there + 1e-6
    if turns is not None:
        q, k = turned(layer, q, turns), turned(layer, k, turns)
    o = ((q @ k.mT) * weight[:, None, None]) @ v / there / denominator
    o = layer.norm(o.transpose(1, 2).reshape(B, N, -1))
    if layer.gate is not None:
        o = o * torch.sigmoid(layer.gate(x))
    return layer.proj(o)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@variants
def test_formula(variant):
    original, linear = layers(variant)
    x = tokens()
    assert_equal(linear(x), by_hand(original, x))
    assert not torch.allclose(linear(x), original(x), atol=1e-3)


@pytest.mark.parametrize("feature_map", ["relu", "exp"])
def test_other_feature_maps(feature_map):
    original, linear = layers("biases", feature_map)
    x = tokens()
    assert_equal(
        linear(x), by_hand(original, x, {"relu": torch.relu, "exp": torch.exp}[feature_map])
    )


@with_rope
@pytest.mark.parametrize("front", [(), (H,), (B, 1), (B, H)], ids=str)
def test_rotary_tables_of_every_kind(variant, front):
    original, linear = layers(variant)
    if H in front and getattr(linear, "num_kv_heads", H) != H:
        pytest.skip("timm cannot turn fewer heads of k by tables of each head")
    x, turns = tokens(), angles(original, *front)
    actual = linear(x, rope=table(original, turns))
    assert_equal(actual, by_hand(original, x, turns=turns))
    assert not torch.allclose(actual, linear(x), atol=1e-3)


@pytest.mark.parametrize("front", [(), (B, 1)], ids=str)
def test_masks_and_rotary_together(front):
    original, linear = layers("rope, grouped")
    x, turns = tokens(), angles(original, *front)
    bias = torch.randn(B, N, device=DEVICE).double()
    bias[0, 7:] = -torch.inf
    actual = linear(x, rope=table(original, turns), attn_mask=bias[:, None, None])
    assert_equal(actual, by_hand(original, x, turns=turns, bias=bias))


@pytest.mark.parametrize("learned", [False, True])
def test_gradients(learned):
    original, linear = layers("rope, halves")
    x, turns = tokens().requires_grad_(), angles(original).requires_grad_(learned)
    leaves = [x, *original.parameters(), *([turns] if learned else [])]
    expected = by_hand(original, x, turns=turns).square().sum()
    actual = linear(x, rope=table(original, turns)).square().sum()
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert theirs.any()
        assert_equal(ours, theirs)


@variants
@pytest.mark.parametrize("form", ["bool", "infinite", "least", "shared"])
def test_a_hidden_key_is_as_if_absent(variant, form):
    original, linear = layers(variant)
    x = tokens()
    seen = torch.arange(N, device=DEVICE) < torch.full((B, 1), 7, device=DEVICE)
    if form == "bool":
        mask = seen[:, None, None]
    elif form == "shared":  # by all pictures
        mask = seen[:1]
    else:
        least = -torch.inf if form == "infinite" else torch.finfo(torch.float64).min
        mask = x.new_zeros(B, 1, 1, N).masked_fill(~seen[:, None, None], least)
    masked = linear(x, attn_mask=mask)
    bias = x.new_zeros(B, N).masked_fill(~seen, -torch.inf)
    assert_equal(masked, by_hand(original, x, bias=bias))
    assert_equal(masked[:, :7], linear(x[:, :7]))


@pytest.mark.parametrize(
    ("kind", "half"),
    [
        ("cat", False), ("cat", True), ("dinov3", False), ("dinov3", True), ("mixed", False),
        ("mrope", True),
    ],
)  # fmt: skip
def test_both_channels_of_a_pair_have_one_angle_in_timm(kind, half):
    options = {"depth": 1} if kind == "mixed" else {"rotate_half": half}
    rope = create_rope_embed(kind, dim=128, num_heads=2, feat_shape=(3, 4), **options)
    embedding = rope.get_embed((3, 4))
    for tables in embedding.chunk(2, -1):
        width = tables.shape[-1] // 2
        pair = tables.split(width, -1) if half else (tables[..., 0::2], tables[..., 1::2])
        assert torch.equal(*pair)


@pytest.mark.parametrize("variant", ["plain", "rope", "eva"])
def test_projections_are_read_in_place(variant, monkeypatch):
    _, linear = layers(variant)
    seen, op = [], timm_rope.linear_attn
    monkeypatch.setattr(
        timm_rope, "linear_attn", lambda q, k, v, **kw: seen.append((q, k, v)) or op(q, k, v, **kw)
    )
    linear(tokens())
    (q, k, v) = seen[0]
    start = q.untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for t in (q, k, v)} == {start}
    assert q.stride() == (N * 3 * C, C // H, 3 * C, 1)


def test_the_constructor_is_timms():
    options = {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm}
    theirs, ours = Attention(C, 2, **options), LinearAttention(C, 2, **options)
    assert isinstance(ours, Attention)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_attention_dropout_is_mentioned(caplog):
    layer = LinearAttention(C, attn_drop=0.25)
    assert caplog.messages == [
        "attn_drop=0.25 has no effect: linear attention has no attention map to drop entries of; "
        "use proj_drop."
    ]
    assert torch.isfinite(layer.to(DEVICE).train()(torch.randn(B, N, C, device=DEVICE))).all()


def test_dropout_after_the_projection():
    layer = LinearAttention(C, proj_drop=0.5).to(DEVICE)
    x = torch.randn(B, N, C, device=DEVICE)
    dropped = layer.train()(x)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    assert not (layer.eval()(x) == 0).any()


@variants
@pytest.mark.parametrize(
    ("shape", "printed"),
    [
        ((B, 1, N, N), f"[{B}, 1, {N}, {N}]"),
        ((B, H, 1, N), f"[{B}, {H}, 1, {N}]"),
        ((N, N), f"[{N}, {N}]"),
        ((B, 1, N), f"[{B}, 1, {N}]"),
        ((B + 1, 1, 1, N), f"[{B + 1}, 1, 1, {N}]"),
        ((B, 1, 1, N - 1), f"[{B}, 1, 1, {N - 1}]"),
        ((1, B, 1, 1, N), f"[1, {B}, 1, 1, {N}]"),
    ],
)
def test_a_mask_of_pairs_is_refused(variant, shape, printed):
    _, linear = layers(variant)
    with pytest.raises(AdapterError) as refusal:
        linear(tokens(), attn_mask=torch.zeros(shape, device=DEVICE))
    assert str(refusal.value) == (
        f"attention_mask {printed} is not a key mask; linear attention can hide keys, not "
        "query-key pairs. A key mask broadcasts from [batch, 1, 1, tokens], as that of NaFlexVit "
        "with use_key_only_attn_mask=True."
    )


@variants
def test_causality_is_refused(variant):
    _, linear = layers(variant)
    with pytest.raises(AdapterError) as refusal:
        linear(tokens(), is_causal=True)
    assert str(refusal.value) == (
        "is_causal=True: fbila is bidirectional only; see flash-linear-attention."
    )


@variants
def test_short_sequences_are_softmax(variant):
    original, linear = layers(variant)
    linear.min_tokens = N + 1
    x = tokens()
    assert torch.equal(linear(x), original(x))
    causal = linear(x, is_causal=True, attn_mask=None)
    assert torch.equal(causal, original(x, is_causal=True))
    linear.min_tokens = N
    assert_equal(linear(x), by_hand(original, x))


@variants
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(variant, dtype):
    original, linear = layers(variant)
    x = tokens()
    expected = linear(x)
    original.to(dtype)
    half = over(original, type(linear))(x.to(dtype))
    assert half.dtype == dtype
    assert (half.double() - expected).norm() < 30 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("variant", ["norms", "rope, norms", "eva"])
@pytest.mark.parametrize("front", [(), (B, 1)], ids=str)
def test_autocast(variant, front):
    original, linear = layers(variant)
    original.float()
    x = tokens().float()
    rope = {} if variant == "norms" else {"rope": table(original, angles(original, *front)).float()}
    with torch.autocast(DEVICE, torch.bfloat16):
        half = linear(x, **rope)
    expected = linear(x, **rope)
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.05 * expected.norm()
