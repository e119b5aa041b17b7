"""Layers with weights of their own in a backbone: classes, factories, and what they are told."""

import backbones
import pytest
import torch
from helpers import DEVICE
from torch import nn
from untouched import modules

from fbila.adapters import AdapterError
from fbila.adapters.timm import AttentionSpec, plan, swap
from fbila.layers import (
    MALA,
    RALA,
    FocusedLinearAttention,
    GeneralizedLinearAttention,
    InLineAttention,
    LinearAttention,
    LiteMLA,
    MLLALinearAttention,
    PolaLinearAttention,
)


@pytest.fixture
def model():
    return backbones.vit()


@torch.no_grad()
def predict(model):
    return model(backbones.picture())


def test_a_class_with_the_same_parameters_starts_from_the_models_weights(model):
    softmax, there = predict(model), modules(model)
    with swap(model):
        linear = predict(model)
    handle = swap(model, LinearAttention)
    torch.testing.assert_close(predict(model), linear)
    layer = model.blocks[0].attn.layer
    assert isinstance(layer, LinearAttention)
    assert layer.qkv.weight is not handle.originals["blocks.0.attn"].qkv.weight
    report = handle.report
    assert {e.target for e in report.swapped} == {"LinearAttention"}
    assert report.added_parameters == 0
    assert report.kept_bytes == sum(
        p.numel() * 4 for original in handle.originals.values() for p in original.parameters()
    )
    handle.unmount()
    assert modules(model) == there
    assert torch.equal(predict(model), softmax)


def test_a_class_with_other_parameters(model):
    softmax = predict(model)
    handle = swap(model, GeneralizedLinearAttention, layers=[1, 2])
    assert handle.report.added_parameters > 0
    linear = predict(model)
    model.blocks[1].attn.layer.to_v.weight.data.zero_()
    changed = predict(model)
    assert not torch.equal(changed, linear)
    with handle.disabled():
        assert torch.equal(predict(model), softmax)
    assert torch.equal(predict(model), changed)
    handle.unmount()
    assert torch.equal(predict(model), softmax)


def test_dtype_device_and_mode_are_the_models(model):
    model.to(torch.float64).train()
    handle = swap(model, LinearAttention)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(m.training for m in model.modules())
    model.to(torch.float32).eval()
    handle.unmount()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(m.training for m in model.modules())


def test_a_factory_is_told_what_there_is():
    model = backbones.eva(
        attn_type="rope", qkv_fused=False, num_kv_heads=1, qk_norm=True, num_reg_tokens=3
    )
    specs = []

    class Layer(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.mix = nn.Linear(dim, dim)

        def forward(self, x, rope):
            assert rope.shape == (16, 32)
            return self.mix(x)

    def factory(spec: AttentionSpec) -> nn.Module:
        specs.append(spec)
        return Layer(spec.dim)

    planned = plan(model, factory)
    assert not specs
    handle = swap(model, factory)
    assert [e.name for e in handle.report.swapped] == [s.name for s in specs]
    assert handle.report.swapped == planned.swapped
    first = specs[0]
    assert first.module is handle.originals["blocks.0.attn"]
    told = {k: v for k, v in vars(first).items() if k != "module"}
    assert told == {
        "name": "blocks.0.attn",
        "dim": 32,
        "out_dim": 32,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "qkv_bias": True,
        "qk_norm": True,
        "scale_norm": False,
        "gated": False,
        "rope": True,
        "num_prefix_tokens": 4,
        "grid_size": (4, 4),
    }
    predict(model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (backbones.eva, "its rotary position embedding would be lost"),
        (backbones.MODELS["norms"], "its query and key norms would be lost"),
        (lambda: backbones.vit(scale_attn_norm=True), "its norm after attention would be lost"),
        (
            lambda: backbones.eva(
                attn_type="rope", qkv_fused=False, num_kv_heads=1, use_rot_pos_emb=False
            ),
            "its projections are not square",
        ),
    ],
)
def test_a_class_must_lose_nothing(make, reason):
    model = make()
    there = modules(model)
    with pytest.raises(AdapterError) as refusal:
        swap(model, LinearAttention)
    assert f"skipped ({reason}; for example blocks.0.attn)" in str(refusal.value)
    assert modules(model) == there


def test_eva_without_rotary_can_have_any_layer():
    model = backbones.eva(use_rot_pos_emb=False)
    swap(model, LinearAttention)
    assert predict(model).isfinite().all()


def test_min_tokens_is_for_the_models_own_weights(model):
    there = modules(model)
    with pytest.raises(AdapterError) as refusal:
        swap(model, LinearAttention, min_tokens=100)
    assert str(refusal.value) == (
        "min_tokens=100 is for attention with the model's own weights, by the name of a feature "
        "map. LinearAttention has others, not for softmax."
    )
    assert modules(model) == there


def test_what_a_factory_must_not_return(model):
    there = modules(model)
    with pytest.raises(AdapterError) as refusal:
        swap(model, lambda spec: spec.name)
    assert str(refusal.value) == "attention must make an nn.Module, got str for blocks.0.attn."
    assert modules(model) == there
    with pytest.raises(AdapterError) as refusal:
        swap(model, lambda spec: nn.Identity())
    assert str(refusal.value) == (
        "attention made a Identity without parameters for blocks.0.attn, which could not be told "
        "where the model is moved to."
    )
    assert modules(model) == there
    model = backbones.eva()
    with pytest.raises(AdapterError) as refusal:
        swap(model, lambda spec: LinearAttention(spec.dim))
    assert str(refusal.value) == (
        "blocks.0.attn is given a rotary position embedding, which LinearAttention.forward does "
        "not take and would ignore. Leave it out (exclude=), or take rope=."
    )


def test_a_factory_that_fails_leaves_the_model_as_it_was(model):
    there = modules(model)

    def failing(spec):
        if spec.name == "blocks.2.attn":
            raise ValueError("no more")
        return LinearAttention(spec.dim)

    with pytest.raises(ValueError, match="no more"):
        swap(model, failing)
    assert modules(model) == there
    swap(model)


def test_a_mask_that_the_layer_does_not_take():
    model = backbones.naflex()
    batch = backbones.patches(model, [(2, 2), (3, 3)])
    swap(model, LinearAttention)
    with pytest.raises(AdapterError) as refusal:
        model(batch)
    assert str(refusal.value) == (
        "blocks.0.attn was called with attn_mask, which LinearAttention.forward does not take and "
        "would ignore."
    )
    with pytest.raises(AdapterError, match="was called with is_causal, which"):
        model.blocks[0].attn(torch.randn(1, 5, 32, device=DEVICE), is_causal=True)


def grid_vit(**changes):
    """4 rows and 6 columns of patches."""
    settings = {"img_size": (32, 48), "class_token": False, "global_pool": "avg"}
    return backbones.vit(**{**settings, **changes})


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (FocusedLinearAttention, "tokens"),
        (PolaLinearAttention, "tokens"),
        (MLLALinearAttention, "tokens"),
        (InLineAttention, "tokens"),
        (RALA, "picture"),
        (MALA, "picture"),
        (lambda spec: LiteMLA(spec.dim, dim=spec.head_dim).eval(), "picture"),
    ],
)
@torch.no_grad()
def test_layers_over_a_grid(kind, layout):
    model = grid_vit()
    own = {}
    with swap(model, kind):
        module = model.blocks[1].attn
        module.register_forward_hook(lambda _, args, out: own.update(x=args[0], y=out))
        assert model(torch.randn(2, 3, 32, 48, device=DEVICE)).isfinite().all()
        x = own["x"]
        if layout == "tokens":
            expected = module.layer(x, 4, 6)
        else:
            expected = module.layer(x.transpose(1, 2).reshape(2, 32, 4, 6)).flatten(2).mT
    assert torch.equal(own["y"], expected)


@torch.no_grad()
def test_another_number_of_tokens_is_a_square():
    model = grid_vit(dynamic_img_size=True)
    swap(model, FocusedLinearAttention)
    assert model(torch.randn(1, 3, 40, 40, device=DEVICE)).isfinite().all()
    with pytest.raises(ValueError, match="for 10 tokens"):
        model(torch.randn(1, 3, 16, 40, device=DEVICE))


@pytest.mark.parametrize("kind", [FocusedLinearAttention, RALA])
def test_a_grid_has_no_class_token(model, kind):
    there = modules(model)
    with pytest.raises(AdapterError) as refusal:
        swap(model, kind)
    assert str(refusal.value) == (
        f"{kind.__name__} takes tokens as a grid, which 1 class or register tokens in front are no "
        'part of (blocks.0.attn). timm.create_model(..., class_token=False, global_pool="avg") '
        "makes a model without them."
    )
    assert modules(model) == there


@torch.no_grad()
def test_inline_attention_takes_class_tokens(model):
    swap(model, InLineAttention)
    assert model.blocks[0].attn.layer.num_prefix_tokens == 1
    assert predict(model).isfinite().all()


def test_a_model_that_does_not_tell_its_grid():
    model = backbones.naflex(reg_tokens=0)
    there = modules(model)
    with pytest.raises(AdapterError) as refusal:
        swap(model, FocusedLinearAttention)
    assert "needs the grid of tokens, which the model does not tell" in str(refusal.value)
    assert modules(model) == there
    swap(model, lambda spec: FocusedLinearAttention(spec.dim, spec.heads, grid_size=4))


def test_what_is_new_can_be_trained_alone(model):
    handle = swap(model, LinearAttention)
    new = list(handle.new_parameters())
    assert sum(p.numel() for p in new) == sum(
        p.numel() for block in model.blocks for p in block.attn.parameters()
    )
    assert {id(p) for p in new} <= {id(p) for p in model.parameters()}
    handle.unmount()
    assert not {id(p) for p in new} & {id(p) for p in model.parameters()}
    assert not list(swap(model).new_parameters())
