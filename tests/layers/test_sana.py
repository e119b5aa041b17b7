"""SANA's linear attention is its formula, and what diffusers' processor computes."""

from functools import partial

import pytest
import torch
from torch import nn
from vision_contracts import (
    Capture,
    assert_compiles,
    assert_factory,
    assert_formula,
    assert_kernels_agree,
    assert_serves,
    memory_of,
    randomize,
)

from fbila.layers import SanaLinearAttention, sana

SHAPES = {"qkv.weight": (192, 64), "proj.weight": (64, 64), "proj.bias": (64,)}
NORMS = {"q_norm.weight": (64,), "k_norm.weight": (64,)}


def by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, *, heads: int) -> torch.Tensor:
    """The published formula, with an explicit (N, N) matrix."""
    b, n, c = x.shape
    qkv = x @ p["qkv.weight"].T
    if "qkv.bias" in p:
        qkv = qkv + p["qkv.bias"]
    q, k, v = qkv.split(c, -1)
    if "q_norm.weight" in p:
        q, k = (t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() for t in (q, k))
        q, k = q * p["q_norm.weight"], k * p["k_norm.weight"]
    q, k, v = (t.view(b, n, heads, -1) for t in (q.relu(), k.relu(), v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-15)
    o = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, c)
    return o @ p["proj.weight"].T + p["proj.bias"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"qk_norm": True}, {"qkv_bias": True, "num_heads": 1}, {"num_heads": 4}],
    ids=str,
)
def test_formula(settings):
    torch.manual_seed(0)
    layer = SanaLinearAttention(64, **settings)
    heads = settings.get("num_heads", 2)
    assert_formula(layer, by_hand, torch.randn(2, 33, 64), heads=heads)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_names_and_shapes(qk_norm):
    shapes = {
        n: tuple(p.shape) for n, p in SanaLinearAttention(64, qk_norm=qk_norm).state_dict().items()
    }
    assert shapes == {**SHAPES, **(NORMS if qk_norm else {})}


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_diffusers_computes_the_same(qk_norm):
    processors = pytest.importorskip("diffusers.models.attention_processor")
    theirs = processors.Attention(
        query_dim=64,
        heads=2,
        kv_heads=2,
        dim_head=32,
        qk_norm=qk_norm,
        processor=processors.SanaLinearAttnProcessor2_0(),
    )
    randomize(theirs)
    state = theirs.state_dict()
    names = {"norm_q": "q_norm", "norm_k": "k_norm", "to_out.0": "proj"}
    weights = {"qkv.weight": torch.cat([state[f"to_{x}.weight"] for x in "qkv"])}
    for name, x in state.items():
        for old, new in names.items():
            if name.startswith(old):
                weights[name.replace(old, new)] = x
    eps = theirs.norm_q.eps if qk_norm else 1e-5
    ours = SanaLinearAttention(64, qk_norm=qk_norm is not None, norm_eps=eps)
    ours.load_state_dict(weights, strict=True)
    x = torch.randn(2, 33, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_nothing_is_copied_on_the_way(monkeypatch):
    layer = SanaLinearAttention(64)
    seen = {}
    layer.qkv.register_forward_hook(lambda _, __, out: seen.update(qkv=out))
    capture = Capture(sana.linear_attn)
    monkeypatch.setattr(sana, "linear_attn", capture)
    layer(torch.randn(2, 15, 64))
    assert {memory_of(t) for t in capture.inputs} == {memory_of(seen["qkv"])}
    assert capture.output.transpose(1, 2).flatten(2)._is_view()


def test_half_precision_stays_finite():
    layer = SanaLinearAttention(64).half()
    nn.init.constant_(layer.proj.bias, 6e4)
    nn.init.constant_(layer.proj.weight, 300)
    nn.init.constant_(layer.qkv.weight, 1)
    out = layer(torch.ones(1, 4, 64, dtype=torch.float16))
    assert (out == 65504).all()


def test_no_query_is_no_answer_and_no_nan():
    layer = SanaLinearAttention(64)
    nn.init.zeros_(layer.qkv.weight)
    assert torch.equal(layer(torch.randn(1, 5, 64)), layer.proj.bias.expand(1, 5, 64))


def test_device_and_dtype_reach_every_parameter():
    assert_factory(partial(SanaLinearAttention, 64, qk_norm=True))


def test_serves():
    assert_serves(SanaLinearAttention(64, qk_norm=True), torch.randn(2, 15, 64))


def test_compiles():
    layer = SanaLinearAttention(64, qk_norm=True)
    assert_compiles(layer, (torch.randn(2, 15, 64),), (torch.randn(2, 28, 64),))


def test_kernels(monkeypatch):
    assert_kernels_agree(monkeypatch, SanaLinearAttention(64), torch.randn(1, 15, 64))


@pytest.mark.parametrize(("dim", "heads"), [(64, 5), (16, None)])
def test_refused(dim, heads):
    with pytest.raises(ValueError, match=f"num_heads must divide dim, got dim={dim}"):
        SanaLinearAttention(dim, heads)
