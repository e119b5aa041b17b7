"""Diffusers models that are shaped like the published ones and small enough for a CPU."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)


def sd15_unet(**changes) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's blocks with few heads: head dims 40, 80, 160, 160; 16 attn1."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "block_out_channels": (80, 160, 160, 160),
        "attention_head_dim": (2, 2, 1, 1),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def sd21_unet() -> UNet2DConditionModel:
    """Stable Diffusion 2.1's: head dim 64 throughout, linear proj_in, upcast_attention."""
    return sd15_unet(
        block_out_channels=(64, 128, 192, 192),
        attention_head_dim=(1, 2, 3, 3),
        use_linear_projection=True,
        upcast_attention=True,
    )


def sdxl_unet(**changes) -> UNet2DConditionModel:
    """Stable Diffusion XL's: no attention at the top, then depths 2 and 3 (10 in the original)."""
    settings = {
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "attention_head_dim": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "cross_attention_dim": 64,
    }
    return sd15_unet(**{**settings, **changes})


def small_unet(**changes) -> UNet2DConditionModel:
    """Two levels, the upper one with attention: 6 attn1, and quick to run."""
    settings = {
        "block_out_channels": (32, 64),
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return sd15_unet(**{**settings, **changes})


def motion_unet() -> UNetMotionModel:
    """A video UNet: spatial attn1 beside temporal attn1 and attn2."""
    torch.manual_seed(0)
    return UNetMotionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        norm_num_groups=8,
        cross_attention_dim=32,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        layers_per_block=1,
    ).eval()


def unet_inputs(unet, batch: int = 2, side: int = 16) -> dict:
    """Keyword arguments for a forward pass."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(batch, 4, side, side, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(
            batch, 7, unet.config.cross_attention_dim, generator=generator
        ),
    }
    if unet.config.get("addition_embed_type") == "text_time":
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 32, generator=generator),
            "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * batch),
        }
    return inputs


def predict(unet, **inputs) -> torch.Tensor:
    """The UNet's prediction, without gradients."""
    with torch.no_grad():
        return unet(**(inputs or unet_inputs(unet))).sample


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer over letters and digits, its files written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24
    )


def _text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        projection_dim=width,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def sd_pipeline(folder: Path, **unet_changes) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights; `folder` takes the tokenizer's files."""
    unet = small_unet(sample_size=8, **unet_changes)
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(32)),
        tokenizer=tokenizer(folder / "tokenizer_files"),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """The same for Stable Diffusion XL, with its two text encoders."""
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(32)),
        tokenizer=tokenizer(folder / "tokenizer_files"),
        tokenizer_2=tokenizer(folder / "tokenizer_files"),
        unet=sdxl_unet(sample_size=8),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
    )
