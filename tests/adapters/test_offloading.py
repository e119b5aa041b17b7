"""Offloading and layerwise casting reach whichever module is in the UNet."""

import copy

import pytest
import tiny_models
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import StableDiffusionPipeline
from untouched import modules

from fbila import LinFusion
from fbila.adapters import AdapterError

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


def mount(unet):
    return LinFusion.construct_for(unet=unet, load_pretrained=False)


def offload_groups(unet, kind):
    unet.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        **({"num_blocks_per_group": 1} if kind == "block_level" else {}),
    )


def offloaded(module) -> list[bool]:
    """Of each linear layer of the module: whether it moves to the GPU for its turn."""
    return [
        "group_offloading" in getattr(getattr(child, "_diffusers_hook", None), "hooks", {})
        for child in module.modules()
        if isinstance(child, torch.nn.Linear)
    ]


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_group_offloading(unet, kind, order):
    softmax = tiny_models.predict(unet)
    linear = tiny_models.predict(mount(copy.deepcopy(unet))._handle.model)
    if order == "before":
        offload_groups(unet, kind)
    linfusion = mount(unet)
    if order == "after":
        offload_groups(unet, kind)
    layer = unet.get_submodule(LAYER)
    assert all(offloaded(layer)) == (kind == "leaf_level") and len(offloaded(layer)) == 8
    assert torch.equal(tiny_models.predict(unet), linear)
    with linfusion.disabled():
        assert all(offloaded(unet.get_submodule(LAYER))) == (kind == "leaf_level")
        assert torch.equal(tiny_models.predict(unet), softmax)
    assert torch.equal(tiny_models.predict(unet), linear)
    linfusion.unmount()
    assert torch.equal(tiny_models.predict(unet), softmax)
    assert not any(offloaded(layer))


def test_sequential_offloading_before_mounting_is_refused(unet):
    softmax = tiny_models.predict(unet)
    cpu_offload(unet, torch.device("cpu"))
    there = modules(unet)
    with pytest.raises(AdapterError, match=r"under sequential CPU offload \(down_blocks"):
        mount(unet)
    assert modules(unet) == there
    assert torch.equal(tiny_models.predict(unet), softmax)


def test_sequential_offloading_after_mounting(unet):
    softmax = tiny_models.predict(unet)
    linfusion = mount(unet)
    linear = tiny_models.predict(unet)
    cpu_offload(unet, torch.device("cpu"))
    assert unet.get_submodule(LAYER).to_q_[0].weight.device.type == "meta"
    assert torch.equal(tiny_models.predict(unet), linear)
    there = modules(unet)
    with pytest.raises(AdapterError, match=r"pipeline\.remove_all_hooks\(\)"):
        linfusion.unmount()
    assert linfusion.mounted and modules(unet) == there
    assert torch.equal(tiny_models.predict(unet), linear)
    remove_hook_from_submodules(unet)
    linfusion.unmount()
    assert torch.equal(tiny_models.predict(unet), softmax)


@pytest.mark.parametrize("order", ["before", "after"])
def test_model_offloading(pipeline_folder, order):
    def run(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a", num_inference_steps=2, generator=generator, output_type="latent"
        ).images

    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    softmax = run(pipeline)
    if order == "before":
        pipeline.enable_model_cpu_offload(device="cpu")
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    if order == "after":
        pipeline.enable_model_cpu_offload(device="cpu")
    assert not torch.allclose(run(pipeline), softmax, atol=1e-4)
    linfusion.unmount()
    assert torch.equal(run(pipeline), softmax)


def cast(unet):
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return unet


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("lora", [False, True])
def test_layerwise_casting(unet, order, lora):
    if lora:
        from test_lora import add_lora

        add_lora(unet)
    softmax = tiny_models.predict(cast(copy.deepcopy(unet)))
    if order == "before":
        cast(unet)
    linfusion = mount(unet)
    if order == "after":
        cast(unet)
    layer = unet.get_submodule(LAYER)
    linears = {n: c for n, c in layer.named_modules() if isinstance(c, torch.nn.Linear)}
    stored = {c.weight.dtype for n, c in linears.items() if "lora" not in n}
    assert stored == {torch.float8_e4m3fn}
    assert layer.to_q_[1].weight.dtype == torch.float32
    linear = tiny_models.predict(unet)
    assert not torch.allclose(linear, softmax, atol=1e-4)
    with linfusion.disabled():
        assert torch.equal(tiny_models.predict(unet), softmax)
    assert torch.equal(tiny_models.predict(unet), linear)
    linfusion.unmount()
    assert torch.equal(tiny_models.predict(unet), softmax)


def test_weights_in_eight_bits_are_not_saved(unet, tmp_path):
    linfusion = mount(unet)
    cast(unet)
    with pytest.raises(AdapterError, match=r"is stored in torch\.float8_e4m3fn by layerwise"):
        linfusion.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_hook_on_a_layer_is_not_lost(unet):
    from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    linfusion = mount(unet)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(unet, config)
    there = modules(unet)
    with pytest.raises(AdapterError, match="carries the hook 'pyramid_attention_broadcast'"):
        linfusion.unmount()
    assert linfusion.mounted and modules(unet) == there
