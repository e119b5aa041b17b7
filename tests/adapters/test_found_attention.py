"""Only spatial self-attention is found, and every other attention is skipped with its reason."""

import pytest
import tiny_models
import torch
from diffusers import (
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.attention_processor import (
    PAGCFGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)

from fbila import LinFusion
from fbila.adapters import AdapterError, plan

SMALL_VIDEO = {
    "block_out_channels": (32, 64),
    "cross_attention_dim": 32,
    "layers_per_block": 1,
    "sample_size": 8,
}


def test_a_unet():
    report = plan(tiny_models.small_unet())
    assert [entry.name for entry in report.swapped] == [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
    ]
    assert [(entry.heads, entry.head_dim) for entry in report.swapped] == [(2, 16)] * 5 + [(2, 32)]
    assert report.reasons() == {"cross-attention": 6}


def test_motion_modules_are_temporal():
    unet = tiny_models.motion_unet()
    report = plan(unet)
    assert not [entry.name for entry in report.swapped if "motion" in entry.name]
    assert len(report.swapped) == 4
    assert report.reasons() == {"temporal attention": 14, "cross-attention": 4}
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    video = torch.randn(1, 4, 3, 8, 8)
    assert unet(video, 1, torch.randn(3, 7, 32)).sample.isfinite().all()
    linfusion.unmount()


def test_unet3d_is_spatial_and_temporal():
    model = UNet3DConditionModel(
        **SMALL_VIDEO,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    report = plan(model)
    assert report.swapped
    assert all(".attentions." in entry.name for entry in report.swapped)
    temporal = {e.name.split(".")[0] for e in report.skipped if e.reason == "temporal attention"}
    assert "transformer_in" in temporal


def test_video_diffusion_is_spatial_and_temporal():
    model = UNetSpatioTemporalConditionModel(
        **SMALL_VIDEO,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    report = plan(model)
    assert report.swapped
    assert not [e.name for e in report.swapped if "temporal" in e.name]
    assert {"cross-attention", "temporal attention"} == set(report.reasons())


def test_only_cross_attention():
    # The attn1 of these blocks sees the text, in as many channels as the picture has.
    report = plan(tiny_models.small_unet(only_cross_attention=True, block_out_channels=(32, 32)))
    assert [entry.name for entry in report.swapped] == [
        "mid_block.attentions.0.transformer_blocks.0.attn1"
    ]
    assert report.reasons() == {"cross-attention": 11}


def test_transformers():
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    assert plan(pixart).reasons() == {
        "the bias of its projections would be lost": 1,
        "cross-attention": 1,
    }
    sana = SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    reason = "runs SanaLinearAttnProcessor2_0, which linear attention would ignore"
    assert plan(sana).reasons() == {reason: 1, "cross-attention": 1}
    sd3 = SD3Transformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16
    )
    assert plan(sd3).reasons() == {"mixes text and image tokens in one softmax": 1}


def test_attention_blocks_of_unconditional_unets():
    report = plan(
        UNet2DModel(
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
    )
    assert not report.swapped
    assert set(report.reasons()) == {"not named attn1"}


def test_a_processor_that_means_another_computation(unet):
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    layer.processor = PAGCFGIdentitySelfAttnProcessor2_0()
    reason = "runs PAGCFGIdentitySelfAttnProcessor2_0, which linear attention would ignore"
    assert plan(unet).reasons()[reason] == 1
    layer.processor = SlicedAttnProcessor(2)  # the same softmax, computed in slices
    assert len(plan(unet).swapped) == 6


def test_linear_attention_is_not_swapped_again(unet):
    LinFusion.construct_for(unet=unet, load_pretrained=False)
    assert plan(unet).reasons()["is linear attention already"] == 6


def test_report_in_words_and_as_data(unet):
    report = LinFusion.construct_for(unet=unet, load_pretrained=False).report
    lines = str(report).splitlines()
    assert lines[0] == "UNet2DConditionModel: 6 swapped, 6 skipped"
    assert lines[1].startswith("  down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    assert lines[1].endswith("2 x 16  Attention -> LinFusionAttention")
    assert lines[7].endswith("skipped: cross-attention")
    data = report.as_dict()
    assert data["swapped"][5]["head_dim"] == 32
    assert data["kept_bytes"] == 4 * (5 * (4 * 32**2 + 32) + 4 * 64**2 + 64)
    assert data["added_parameters"] == sum(2 * (2 * d**2 + 4 * d) for d in [32] * 5 + [64])


@pytest.mark.parametrize("thing", [{}, None, "unet"])
def test_not_a_model(thing):
    message = (
        "Expected an nn.Module or a DiffusionPipeline with .unet or .transformer, got "
        f"{type(thing).__name__}."
    )
    with pytest.raises(AdapterError, match=message):
        plan(thing)
