"""Models whose attention is linear already, as published but with random weights, and its modules.

diffusers is imported where a model of it is made.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models.efficientvit_mit import EfficientVit, LiteMLA
from torch import Tensor, nn

import fbila

# DC-AE-f32 as Sana has it.
_DC_AE: dict[str, Any] = {
    "attention_head_dim": 32,
    "widths": (128, 256, 512, 512, 1024, 1024),
    "scales": ((), (), (), (5,), (5,), (5,)),
    "encoder": (2, 2, 2, 3, 3, 3),
    "decoder": (3, 3, 3, 3, 3, 3),
    "latent_channels": 32,
}
_TINY_DC_AE: dict[str, Any] = {
    "attention_head_dim": 8,
    "widths": (8, 16, 16),
    "scales": ((), (5,), (5,)),
    "encoder": (1, 1, 1),
    "decoder": (1, 1, 1),
    "latent_channels": 4,
}
_TINY_SANA: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
    "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8,
    "cross_attention_dim": 16, "caption_channels": 16,
}  # fmt: skip
_CAPTION = 300


@contextmanager
def accelerated(model: nn.Module) -> Iterator[None]:
    with fbila.accelerate(model):
        yield


@contextmanager
def projections_alone(model: nn.Module) -> Iterator[None]:
    """A diffusers `Attention` without attention: the products that any kernel leaves."""
    attention: Any = model.attention

    def forward(hidden_states: Tensor, **_: Any) -> Tensor:
        attention.to_q(hidden_states)
        attention.to_k(hidden_states)
        return attention.to_out[0](attention.to_v(hidden_states))

    attention.forward = forward
    try:
        yield
    finally:
        del attention.forward


class OneModule(nn.Module):
    """A model of one attention module, which is its child so that it can be replaced."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.attention(*args, **kwargs)


def sana(px: int) -> nn.Module:
    """Sana-1.6B, which is what its class makes by default."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel()


def tiny_sana(px: int) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(**_TINY_SANA)


def sana_video(px: int) -> nn.Module:
    """SanaVideo-2B likewise."""
    from diffusers import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel()


def tiny_sana_video(px: int) -> nn.Module:
    from diffusers import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(**_TINY_SANA, qk_norm="rms_norm_across_heads")


def dc_ae(px: int, settings: Mapping[str, Any] = _DC_AE) -> nn.Module:
    from diffusers import AutoencoderDC

    kinds = tuple("EfficientViTBlock" if scale else "ResBlock" for scale in settings["scales"])
    return AutoencoderDC(
        latent_channels=settings["latent_channels"],
        attention_head_dim=settings["attention_head_dim"],
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=settings["widths"],
        decoder_block_out_channels=settings["widths"],
        encoder_layers_per_block=settings["encoder"],
        decoder_layers_per_block=settings["decoder"],
        encoder_qkv_multiscales=settings["scales"],
        decoder_qkv_multiscales=settings["scales"],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )


def tiny_dc_ae(px: int) -> nn.Module:
    return dc_ae(px, _TINY_DC_AE)


def efficientvit(px: int) -> nn.Module:
    return timm.create_model("efficientvit_l2")


def tiny_efficientvit(px: int) -> nn.Module:
    settings = {"widths": (8, 8, 16, 32, 32), "depths": (1, 1, 1, 1, 1), "head_dim": 8}
    return EfficientVit(**settings, head_widths=(16, 16), num_classes=10)


def sana_attention(px: int) -> nn.Module:
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    processor = SanaLinearAttnProcessor2_0()
    return OneModule(Attention(2240, heads=70, dim_head=32, processor=processor))


def sana_video_attention(px: int) -> nn.Module:
    from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformerBlock

    return OneModule(SanaVideoTransformerBlock(attention_bias=False).attn1)


def dc_ae_attention(px: int) -> nn.Module:
    """Of the level with an eighth of the side, which has the most positions."""
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

    settings = {"norm_type": "rms_norm", "residual_connection": True}
    return OneModule(SanaMultiscaleLinearAttention(512, 512, attention_head_dim=32, **settings))


def lite_mla(px: int) -> nn.Module:
    """Of efficientvit_l2's level with a sixteenth of the side."""
    return OneModule(LiteMLA(384, 384, dim=32))


def draw_sana(
    px: int, batch: int, generator: torch.Generator, channels: int = 32, caption: int = 2304
) -> dict[str, Tensor]:
    side = px // 32
    return {
        "hidden_states": _normal(generator, batch, channels, side, side),
        "encoder_hidden_states": _normal(generator, batch, _CAPTION, caption),
        "timestep": torch.full((batch,), 500.0, device=generator.device),
    }


def draw_tiny_sana(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return draw_sana(px, batch, generator, channels=4, caption=16)


def draw_sana_video(
    px: int, batch: int, generator: torch.Generator, channels: int = 16, caption: int = 2304
) -> dict[str, Tensor]:
    """81 frames, px wide and 15 / 26 of it high: 832 px make 32,760 tokens."""
    # Latents of an even size, which patches of 2 x 2 divide.
    height, width = px * 15 // 26 // 16 * 2, px // 16 * 2
    return {
        "hidden_states": _normal(generator, batch, channels, 21, height, width),
        "encoder_hidden_states": _normal(generator, batch, _CAPTION, caption),
        "timestep": torch.full((batch,), 500.0, device=generator.device),
    }


def draw_tiny_video(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return draw_sana_video(px, batch, generator, channels=4, caption=16)


def draw_sana_tokens(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"hidden_states": _normal(generator, batch, (px // 32) ** 2, 2240)}


def draw_video_tokens(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    from diffusers.models.transformers.transformer_sana_video import WanRotaryPosEmbed

    size = (21, px * 15 // 26 // 16, px // 16)
    video = torch.zeros(1, 1, *size, device=generator.device)
    cos, sin = WanRotaryPosEmbed(112, (1, 1, 1), 1024).to(generator.device)(video)
    return {"hidden_states": _normal(generator, batch, cos.shape[1], 2240), "cos": cos, "sin": sin}


def draw_latents(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"z": _normal(generator, batch, 32, px // 32, px // 32)}


def draw_tiny_latents(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"z": _normal(generator, batch, 4, px // 4, px // 4)}


def draw_dc_ae_level(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"hidden_states": _normal(generator, batch, 512, px // 8, px // 8)}


def draw_lite_mla_level(px: int, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": _normal(generator, batch, 384, px // 16, px // 16)}


def call_transformer(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def call_decoder(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    return model.decode(inputs["z"], return_dict=False)[0]


def call_rotated(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    return model(inputs["hidden_states"], rotary_emb=(inputs["cos"], inputs["sin"]))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
