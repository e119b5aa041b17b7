"""Hooks of diffusers that reach into attention act on LinFusion's layers, or are refused."""

import pytest
import tiny_models
import torch
from diffusers import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.guiders import PerturbedAttentionGuidance
from diffusers.hooks import apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from untouched import modules

from fbila import LinFusion
from fbila.adapters import AdapterError

BLOCKS = "mid_block.attentions.0.transformer_blocks"
LAYER = f"{BLOCKS}.0.attn1"


def mount(unet):
    return LinFusion.construct_for(unet=unet, load_pretrained=False)


def skip(unet, **options):
    config = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": False}
    apply_layer_skip(unet, LayerSkipConfig([0], BLOCKS, **{**config, **options}))


def unhook(module):
    for name in list(module._diffusers_hook.hooks):
        module._diffusers_hook.remove_hook(name)


def test_skipped_attention_maps_are_refused(unet):
    linfusion = mount(unet)
    linear = tiny_models.predict(unet)
    skip(unet, skip_attention_scores=True)
    with pytest.raises(AdapterError, match=f"skip_attention_scores was set on {LAYER}"):
        tiny_models.predict(unet)
    unhook(unet.get_submodule(LAYER))
    assert torch.equal(tiny_models.predict(unet), linear)
    linfusion.unmount()


def test_the_guider_that_skips_them_is_refused(unet):
    mount(unet)
    config = LayerSkipConfig(
        [0], BLOCKS, skip_attention=False, skip_ff=False, skip_attention_scores=True
    )
    guider = PerturbedAttentionGuidance(perturbed_guidance_config=config)
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(500))
    guider._count_prepared = 2
    guider.prepare_models(unet)
    with pytest.raises(AdapterError, match=f"skip_attention_scores was set on {LAYER}"):
        tiny_models.predict(unet)
    guider.cleanup_models(unet)
    tiny_models.predict(unet)


@pytest.mark.parametrize("what", ["skip_attention", "skip_attention_scores"])
def test_a_skipped_layer_cannot_be_replaced(unet, what):
    skip(unet, **{what: True})
    softmax, there = tiny_models.predict(unet), modules(unet)
    with pytest.raises(AdapterError, match=f"{LAYER} carries the hook 'layer_skip_hook'"):
        mount(unet)
    assert modules(unet) == there
    assert torch.equal(tiny_models.predict(unet), softmax)


def test_a_skipped_layer_is_skipped(unet):
    linfusion = mount(unet)
    linear = tiny_models.predict(unet)
    skip(unet, skip_attention=True)
    assert not torch.allclose(tiny_models.predict(unet), linear, atol=1e-3)
    with pytest.raises(AdapterError, match="carries the hook 'layer_skip_hook'"):
        linfusion.unmount()
    unhook(unet.get_submodule(LAYER))
    linfusion.unmount()


@pytest.mark.parametrize("order", ["before", "after"])
def test_smoothed_energy_guidance_is_not_lost(unet, order):
    """It hooks to_q inside of the layer."""
    config = SmoothedEnergyGuidanceConfig([0], fqn=BLOCKS)
    if order == "before":
        _apply_smoothed_energy_guidance_hook(unet, config, 10.0)
        with pytest.raises(AdapterError, match="carries the hook 'smoothed_energy_guidance_hook'"):
            mount(unet)
    else:
        linfusion = mount(unet)
        _apply_smoothed_energy_guidance_hook(unet, config, 10.0)
        with pytest.raises(AdapterError, match="carries the hook 'smoothed_energy_guidance_hook'"):
            linfusion.unmount()
        assert linfusion.mounted
