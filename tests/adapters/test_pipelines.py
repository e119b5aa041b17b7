"""Whole diffusers pipelines run with LinFusion, and answer as ever once it is off."""

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    UNetMotionModel,
)
from torch import nn

from fbila import LinFusion
from fbila.adapters import AdapterError, plan

PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
MASK = (PICTURE[:, :1] > 0.5).float()


def motion_adapter() -> MotionAdapter:
    torch.manual_seed(3)
    return MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=2,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )


# Each gives the pipeline, and what it is called with beside the prompt.


def text_to_image(folder):
    return tiny_models.sd_pipeline(folder), {}


def image_to_image(folder):
    pipeline = StableDiffusionImg2ImgPipeline.from_pipe(tiny_models.sd_pipeline(folder))
    return pipeline, {"image": PICTURE, "strength": 1.0}


def inpainting(folder):
    pipeline = StableDiffusionInpaintPipeline.from_pipe(tiny_models.sd_pipeline(folder))
    return pipeline, {"image": PICTURE, "mask_image": MASK, "strength": 1.0}


def controlled(folder):
    pipeline = tiny_models.sd_pipeline(folder)
    controlnet = ControlNetModel.from_unet(pipeline.unet)
    for zero in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        nn.init.normal_(zero.weight, std=0.1)
    pipeline = StableDiffusionControlNetPipeline.from_pipe(pipeline, controlnet=controlnet)
    return pipeline, {"image": PICTURE}


def xl(folder):
    return tiny_models.sdxl_pipeline(folder), {"height": 64, "width": 64}


def animation(folder):
    base = tiny_models.sd_pipeline(folder)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    parts = {name: getattr(base, name) for name in names}
    return AnimateDiffPipeline(**parts, motion_adapter=motion_adapter()), {"num_frames": 2}


PIPELINES = {
    make.__name__: make
    for make in (text_to_image, image_to_image, inpainting, controlled, xl, animation)
}


def generate(pipeline, **inputs) -> np.ndarray:
    """The pictures or frames of a short run, always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    inputs = {"num_inference_steps": 3, "output_type": "np", **inputs}
    return pipeline("a cat", generator=generator, **inputs)[0]


@pytest.mark.parametrize("kind", PIPELINES)
def test_runs_linear_and_softmax_again(kind, tmp_path):
    pipeline, inputs = PIPELINES[kind](tmp_path)
    softmax = generate(pipeline, **inputs)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    linear = generate(pipeline, **inputs)
    assert np.isfinite(linear).all()
    assert not np.allclose(linear, softmax, atol=2e-3)
    with linfusion.disabled():
        assert np.array_equal(generate(pipeline, **inputs), softmax)
    assert np.array_equal(generate(pipeline, **inputs), linear)
    linfusion.unmount()
    assert np.array_equal(generate(pipeline, **inputs), softmax)


def test_pipelines_of_the_same_parts_share_linfusion(tmp_path):
    pipeline, _ = text_to_image(tmp_path)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    softmax = generate(other, image=PICTURE, strength=1.0)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    linear = generate(other, image=PICTURE, strength=1.0)
    assert not np.allclose(linear, softmax, atol=2e-3)
    made_later = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert np.array_equal(generate(made_later, image=PICTURE, strength=1.0), linear)
    linfusion.unmount()
    assert np.array_equal(generate(made_later, image=PICTURE, strength=1.0), softmax)


def test_animation_keeps_its_temporal_attention(tmp_path):
    pipeline, _ = animation(tmp_path)
    report = LinFusion.construct_for(pipeline, load_pretrained=False).report
    assert len(report.swapped) == 6
    assert not [entry.name for entry in report.swapped if "motion_modules" in entry.name]
    temporal = [entry for entry in report.skipped if "motion_modules" in entry.name]
    assert {entry.reason for entry in temporal} == {"temporal attention"}
    assert report.reasons() == {"temporal attention": len(temporal), "cross-attention": 6}


@pytest.mark.parametrize("first", [True, False])
def test_free_noise_animation(tmp_path, first):
    # Longer videos, for which diffusers puts other blocks around the temporal attention.
    pipeline, _ = animation(tmp_path)
    softmax = generate(pipeline, num_frames=2)
    if first:
        pipeline.enable_free_noise(context_length=4, context_stride=2)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    pipeline.enable_free_noise(context_length=4, context_stride=2)
    assert set(plan(pipeline).reasons()) == {
        "temporal attention",
        "cross-attention",
        "is linear attention already",
    }
    assert np.isfinite(generate(pipeline, num_frames=6)).all()
    linfusion.unmount()
    pipeline.disable_free_noise()
    assert np.array_equal(generate(pipeline, num_frames=2), softmax)


def test_an_animation_is_made_from_the_softmax_model(tmp_path):
    pipeline, inputs = animation(tmp_path)
    softmax = generate(pipeline, **inputs)
    unet = tiny_models.small_unet(sample_size=8)
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    with pytest.raises(RuntimeError, match=r"attn1\.to_q_\.0\.weight"):
        UNetMotionModel.from_unet2d(unet, motion_adapter())
    assert linfusion.mounted
    with linfusion.disabled():
        pipeline.unet = UNetMotionModel.from_unet2d(unet, motion_adapter())
    assert np.array_equal(generate(pipeline, **inputs), softmax)


def test_perturbed_attention_guidance_is_refused(tmp_path):
    pipeline = StableDiffusionPAGPipeline.from_pipe(
        tiny_models.sd_pipeline(tmp_path), pag_applied_layers=["mid"]
    )
    plain = generate(pipeline, pag_scale=0.0)
    guided = generate(pipeline, pag_scale=3.0)
    assert not np.allclose(guided, plain, atol=2e-3)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    assert not np.allclose(generate(pipeline, pag_scale=0.0), plain, atol=2e-3)
    message = (
        r"PAGCFGIdentitySelfAttnProcessor2_0 was set on "
        r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1, which runs linear attention"
    )
    with pytest.raises(AdapterError, match=message):
        generate(pipeline, pag_scale=3.0)
    with linfusion.disabled():
        assert np.array_equal(generate(pipeline, pag_scale=3.0), guided)
    linfusion.unmount()
    assert np.array_equal(generate(pipeline, pag_scale=3.0), guided)
    assert np.array_equal(generate(pipeline, pag_scale=0.0), plain)


def test_after_guidance_was_refused_mounting_anew_helps(tmp_path):
    pipeline = StableDiffusionPAGPipeline.from_pipe(
        tiny_models.sd_pipeline(tmp_path), pag_applied_layers=["mid"]
    )
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    linear = generate(pipeline, pag_scale=0.0)
    with pytest.raises(AdapterError):
        generate(pipeline, pag_scale=3.0)  # which leaves its processor where it set it
    linfusion.unmount()
    linfusion.mount_to(pipeline)
    assert np.array_equal(generate(pipeline, pag_scale=0.0), linear)
