"""Official weights for models of another picture size."""

import logging
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn

from ..layers.grid import resize_positions

logger = logging.getLogger(__name__)


def fit_positions(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state dict whose tables of positions are resized to those of the model.

    timm calls it for `create_model(..., pretrained=True)`. Tables of the right size stay as they
    are; others are taken for those of squares.

    Args:
        state_dict: Official weights, or a checkpoint that has them as "model".
        model: FLatten or PolaFormer, whose `img_size` may be another.
    """
    fitted = dict(state_dict.get("model", state_dict))
    for name, parameter in model.named_parameters():
        table = fitted.get(name)
        if table is None or table.shape == parameter.shape:
            continue
        owner, _, last = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        if last == "relative_position_bias_table":
            size = module.window_size
            fitted[name] = resize_rel_pos_bias_table(table, size, tuple(parameter.shape))
        elif last == "positional_encoding":
            fitted[name] = _resized(table, module.key_grid)
        elif last.startswith("pos_embed"):
            fitted[name] = _resized(table, module.grid_sizes[int(last[-1]) - 1])
        else:
            continue
        shapes = tuple(table.shape), tuple(parameter.shape)
        logger.info("Resized %s from %s to %s", name, *shapes)
    return fitted


@torch.no_grad()
def _resized(table: Tensor, size: tuple[int, int]) -> Tensor:
    side = round(table.shape[1] ** 0.5)
    return resize_positions(table, (side, side), size)
