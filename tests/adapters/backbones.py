"""timm models of every kind that can be swapped, small enough for a CPU."""

import torch
from helpers import DEVICE
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIZE = 32


def vit(**changes) -> nn.Module:
    """3 blocks, 2 heads of 16, 16 patches and a class token."""
    settings = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return _made(VisionTransformer, {**settings, "num_classes": 5, **changes})


def eva(**changes) -> nn.Module:
    settings = {
        "img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
        "num_classes": 5, "use_rot_pos_emb": True, "rope_grid_offset": 0.5,
    }  # fmt: skip
    return _made(Eva, {**settings, **changes})


def naflex(**changes) -> nn.Module:
    settings = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 1}
    return _made(NaFlexVit, {"cfg": NaFlexVitCfg(**{**settings, **changes}), "num_classes": 5})


def _made(kind: type[nn.Module], settings: dict) -> nn.Module:
    torch.manual_seed(0)
    model = kind(**settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # timm starts some of them at 0, heads near it, and attention next to uniform.
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif "attn" in name or name.startswith("head"):
                parameter.normal_(std=0.3)
    return model if next(model.parameters()).is_meta else model.to(DEVICE)


MODELS = {
    "vit": vit,
    "prefix": lambda: vit(reg_tokens=4, dynamic_img_size=True),
    "no prefix": lambda: vit(class_token=False, global_pool="avg"),
    "norms": lambda: vit(qk_norm=True, scale_attn_norm=True, init_values=0.5),
    "eva": eva,
    "eva, separate": lambda: eva(qkv_fused=False, scale_attn_inner=True, num_reg_tokens=2),
    "rope": lambda: eva(attn_type="rope", qk_norm=True),
    "rope, halves": lambda: eva(attn_type="rope", rope_type="dinov3", rope_rotate_half=True),
    "rope, learned": lambda: eva(attn_type="rope", rope_type="mixed"),
    "rope, grouped": lambda: eva(attn_type="rope", qkv_fused=False, num_kv_heads=1),
    "naflex": naflex,
    "naflex, rope": lambda: naflex(rope_type="axial", pos_embed="none"),
    "levels": lambda: _made(
        PoolingVisionTransformer,
        {
            "img_size": SIZE, "patch_size": 4, "stride": 4, "base_dims": (8, 8, 8),
            "depth": (1, 1, 1), "heads": (1, 2, 4), "mlp_ratio": 2, "num_classes": 5,
        },
    ),
}  # fmt: skip


def picture(size: int = SIZE, batch: int = 2) -> torch.Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE)


def patches(model: nn.Module, grids: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """A NaFlex batch of pictures of these many patches, padded to the longest."""
    width = 3 * model.embeds.patch_size[0] ** 2
    longest = max(h * w for h, w in grids)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "patches": torch.zeros(len(grids), longest, width),
        "patch_coord": torch.zeros(len(grids), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(grids), longest, dtype=torch.bool),
    }
    for number, (h, w) in enumerate(grids):
        batch["patches"][number, : h * w] = torch.randn(h * w, width, generator=generator)
        coords = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        batch["patch_coord"][number, : h * w] = coords
        batch["patch_valid"][number, : h * w] = True
    return {name: x.to(DEVICE) for name, x in batch.items()}
