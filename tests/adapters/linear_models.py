"""Models whose attention is linear already, shaped like the published ones and small."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderDC,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SanaVideoTransformer3DModel,
)
from helpers import DEVICE
from timm.models.coat import CoaT
from timm.models.efficientvit_mit import EfficientVit
from torch import Tensor, nn

_SANA = {
    "in_channels": 4, "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
    "caption_channels": 16, "mlp_ratio": 1.0, "sample_size": 8, "patch_size": 1,
}  # fmt: skip


def sana(**changes) -> nn.Module:
    return _made(SanaTransformer2DModel, {**_SANA, "out_channels": 4, **changes})


def controlnet() -> nn.Module:
    return _made(SanaControlNetModel, _SANA)


def sana_video(**changes) -> nn.Module:
    settings = {
        **_SANA, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12,
        "patch_size": (1, 1, 1), "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip
    return _made(SanaVideoTransformer3DModel, {**settings, **changes})


def dc_ae(**changes) -> nn.Module:
    """An encoder and a decoder of three levels, the last two with attention."""
    kinds = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    settings = {
        "latent_channels": 4, "attention_head_dim": 8, "encoder_block_types": kinds,
        "decoder_block_types": kinds, "encoder_block_out_channels": (8, 16, 16),
        "decoder_block_out_channels": (8, 16, 16), "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1), "encoder_qkv_multiscales": ((), (), (5,)),
        "decoder_qkv_multiscales": ((), (3, 5), (5,)), "upsample_block_type": "interpolate",
    }  # fmt: skip
    return _made(AutoencoderDC, {**settings, **changes})


def efficientvit() -> nn.Module:
    settings = {
        "widths": (8, 8, 16, 32, 32), "depths": (1, 1, 1, 2, 1), "head_dim": 8,
        "head_widths": (16, 16), "num_classes": 5,
    }  # fmt: skip
    return _made(EfficientVit, settings)


def coat() -> nn.Module:
    settings = {
        "img_size": 64, "patch_size": 4, "embed_dims": (16, 16, 16, 16), "num_heads": 8,
        "serial_depths": (1, 1, 1, 1), "parallel_depth": 1, "mlp_ratios": (1, 1, 1, 1),
        "num_classes": 5,
    }  # fmt: skip
    return _made(CoaT, settings)


class Case(NamedTuple):
    """A model, its inputs, and how many of its modules are accelerated and skipped."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    swapped: int
    skipped: int = 0

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        inputs = self.inputs()
        result = model(**{
            name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in inputs.items()
        })  # fmt: skip
        while not isinstance(result, Tensor):
            result = result[0]
        return result


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(DEVICE)


def _sana_inputs() -> dict:
    return {
        "hidden_states": _normal(2, 4, 8, 10), "encoder_hidden_states": _normal(2, 5, 16),
        "timestep": torch.tensor([3, 7], device=DEVICE), "return_dict": False,
    }  # fmt: skip


CASES = {
    "Sana": Case(sana, _sana_inputs, 4, 2),
    "Sana, norms": Case(lambda: sana(qk_norm="rms_norm_across_heads"), _sana_inputs, 4, 2),
    "ControlNet": Case(
        controlnet,
        lambda: {
            **_sana_inputs(), "controlnet_cond": _normal(2, 4, 8, 10), "conditioning_scale": 1.0,
        },
        4,
        2,
    ),
    "SanaVideo": Case(
        sana_video, lambda: {**_sana_inputs(), "hidden_states": _normal(2, 4, 3, 4, 6)}, 4, 2
    ),
    "DC-AE": Case(dc_ae, lambda: {"sample": _normal(2, 3, 32, 48), "return_dict": False}, 8),
    "EfficientViT": Case(efficientvit, lambda: {"x": _normal(2, 3, 96, 128)}, 3),
    "CoaT": Case(coat, lambda: {"x": _normal(2, 3, 64, 64)}, 7),
}  # fmt: skip


def _made(kind: type[nn.Module], settings: dict) -> nn.Module:
    torch.manual_seed(0)
    model = kind(**settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases, gates and the ends of a ControlNet start at 0, CoaT's weights near it.
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif kind is CoaT or name.startswith(("head.", "controlnet_blocks")):
                parameter.normal_(std=0.3)
    return model.to(DEVICE)
