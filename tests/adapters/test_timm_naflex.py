"""NaFlexVit: pictures of different sizes in one batch answer as each would alone."""

import backbones
import pytest
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

from fbila.adapters import AdapterError, unswap
from fbila.adapters.timm import LinearAttention, swap

GRIDS = [(2, 3), (4, 4), (3, 3)]
POSITIONS = {
    "learned": {},
    "rope": {"rope_type": "axial", "pos_embed": "none"},
    "halves": {"rope_type": "dinov3", "rope_rotate_half": True, "pos_embed": "none"},
    "rope of each head": {"rope_type": "mixed", "pos_embed": "none"},
    "grouped": {"rope_type": "axial", "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
}
each = pytest.mark.parametrize("positions", POSITIONS)


def naflex(positions: str) -> torch.nn.Module:
    return backbones.naflex(global_pool="avg", **POSITIONS[positions])


@torch.no_grad()
def features(model, batch, number: int | None = None):
    """Of the whole batch, or of one picture alone without its padding."""
    if number is not None:
        length = int(batch["patch_valid"][number].sum())
        batch = {name: x[number : number + 1, :length] for name, x in batch.items()}
    return model.forward_features(**batch)["patches"]


@each
@pytest.mark.parametrize("attention", ["elu1", "relu"])
def test_padding_is_as_if_absent(positions, attention):
    model = naflex(positions)
    batch = backbones.patches(model, GRIDS)
    swap(model, attention)
    together = features(model, batch)
    for number, (h, w) in enumerate(GRIDS):
        alone = features(model, batch, number)
        assert alone.shape[1] == 1 + h * w
        torch.testing.assert_close(
            together[number : number + 1, : 1 + h * w], alone, rtol=1e-4, atol=1e-5
        )


@each
def test_what_stands_in_the_padding_does_not_matter(positions):
    model = naflex(positions)
    batch = backbones.patches(model, GRIDS)
    swap(model)
    before = model(batch)
    batch["patches"][~batch["patch_valid"]] = 100.0
    assert torch.equal(model(batch), before)


@each
def test_the_mask_is_by_keys_as_long_as_it_is_linear(positions):
    model = naflex(positions)
    batch = backbones.patches(model, GRIDS)
    softmax = features(model, batch)
    handle = swap(model)
    assert model.use_key_only_attn_mask is True
    with handle.disabled():
        assert model.use_key_only_attn_mask is False
        assert torch.equal(features(model, batch), softmax)
    assert model.use_key_only_attn_mask is True
    unswap(model)
    assert model.use_key_only_attn_mask is False
    assert torch.equal(features(model, batch), softmax)


def test_a_model_that_had_such_a_mask_keeps_it():
    model = backbones.naflex(use_key_only_attn_mask=True)
    swap(model).unmount()
    assert model.use_key_only_attn_mask is True


def test_a_model_within_another():
    outer = torch.nn.ModuleDict({"encoder": naflex("learned")})
    handle = swap(outer)
    assert outer["encoder"].use_key_only_attn_mask is True
    handle.unmount()
    assert outer["encoder"].use_key_only_attn_mask is False


def test_short_ones_are_softmax_with_the_same_valid_tokens():
    model = naflex("learned")
    batch = backbones.patches(model, GRIDS)
    softmax = features(model, batch)
    swap(model, min_tokens=1000)
    valid = torch.nn.functional.pad(batch["patch_valid"], (1, 0), value=True)
    torch.testing.assert_close(features(model, batch)[valid], softmax[valid], rtol=1e-4, atol=1e-5)


def test_patch_dropout_in_training():
    model = backbones.naflex(
        patch_drop_rate=0.25, rope_type="axial", pos_embed="none", global_pool="avg"
    )
    batch = backbones.patches(model.train(), GRIDS)
    swap(model)
    model(batch).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_as_an_attention_layer_it_needs_the_mask_by_keys():
    def made(**changes):
        settings = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, **changes}
        torch.manual_seed(0)
        return NaFlexVit(NaFlexVitCfg(**settings, attn_layer=LinearAttention), num_classes=5).eval()

    pairs = made()
    batch = backbones.patches(pairs, GRIDS)
    assert pairs(backbones.picture()).shape == (2, 5)
    with pytest.raises(AdapterError, match=r"attention_mask \[3, 1, 16, 16\] is not a key mask"):
        pairs(batch)
    keys = made(use_key_only_attn_mask=True)
    assert keys(batch).isfinite().all()
