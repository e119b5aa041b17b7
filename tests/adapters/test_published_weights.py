"""UNets of the published shapes, at full size, are known by their shape and not by a name."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from fbila.adapters import AdapterError, plan
from fbila.adapters.linfusion.weights import find_weights

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}


def full_size(settings) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**settings)


@pytest.mark.parametrize(
    ("settings", "count", "repository"),
    [
        (SD15, 16, "Yuanshi/LinFusion-1-5"),
        ({**SD15, "in_channels": 9}, 16, "Yuanshi/LinFusion-1-5"),
        (SD21, 16, "Yuanshi/LinFusion-2-1"),
        (SDXL, 70, "Yuanshi/LinFusion-XL"),
    ],
    ids=["sd15", "sd15-inpainting", "sd21", "sdxl"],
)
def test_known_shapes(settings, count, repository):
    unet = full_size(settings)
    report = plan(unet)
    assert len(report.swapped) == count
    assert find_weights(unet, report) == repository


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**SDXL, "cross_attention_dim": 1280}, "cross_attention_dim=1280, 70 spatial attn1"),
        (
            {**SD15, "block_out_channels": (160, 320, 640, 640)},
            "cross_attention_dim=768, 16 spatial attn1",
        ),
    ],
    ids=["refiner-like", "narrow"],
)
def test_unknown_shapes(settings, words):
    unet = full_size(settings)
    with pytest.raises(AdapterError, match=words):
        find_weights(unet, plan(unet))
