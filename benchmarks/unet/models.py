"""The UNets of Stable Diffusion 1.5 and XL, with random weights, and one step's inputs.

Nothing is downloaded: the configurations are those of the published models, and the time of a step
does not depend on the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

TEXT_TOKENS = 77
LATENT = 8  # pixels to a latent, along each side


@dataclass(frozen=True)
class UNet:
    """A model to be made.

    Attributes:
        config: What `UNet2DConditionModel` is made with.
        mid_dim_scale: LinFusion's non-linear projections are as wide as the channels / this.
        gate_px: The picture on which the gate compares with a more precise run.
    """

    config: Mapping[str, Any]
    mid_dim_scale: int | None
    gate_px: int


_COMMON = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}

SD15 = {
    **_COMMON,
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "attention_head_dim": 8,  # heads; the name is diffusers' own mistake
    "cross_attention_dim": 768,
}

SDXL = {
    **_COMMON,
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# For trying the benchmark out on a CPU.
TINY = {
    **_COMMON,
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}

UNETS = {
    "sd15": UNet(SD15, mid_dim_scale=None, gate_px=512),
    "sdxl": UNet(SDXL, mid_dim_scale=16, gate_px=1024),
    "tiny": UNet(TINY, mid_dim_scale=None, gate_px=64),
}


def make_unet(name: str, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """The same weights at every call on one kind of device."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**UNETS[name].config)
    return unet.to(dtype).eval().requires_grad_(False)


def make_inputs(
    name: str, px: int, batch: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor | dict[str, Tensor]]:
    """What the UNet is called with for a picture of `px` by `px` pixels."""
    config = UNETS[name].config
    generator = torch.Generator(device).manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    inputs: dict[str, Any] = {
        "sample": draw(batch, config["in_channels"], px // LATENT, px // LATENT),
        # On the device, so that no step waits for a copy of it.
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": draw(batch, TEXT_TOKENS, config["cross_attention_dim"]),
    }
    if config.get("addition_embed_type") == "text_time":
        ids = torch.tensor([[px, px, 0, 0, px, px]] * batch, device=device, dtype=dtype)
        wide = config["projection_class_embeddings_input_dim"]
        wide -= ids.shape[1] * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": draw(batch, wide), "time_ids": ids}
    return inputs
