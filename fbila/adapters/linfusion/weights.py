"""Where the LinFusion weights for a UNet come from.

A UNet is known by its shape: fine-tunes and moved repositories keep it, names they do not.
"""

from pathlib import Path
from typing import Any

from torch import nn

from ..report import AdapterError, SwapReport

# (cross_attention_dim, dim of each spatial attn1 -> how many) of the UNets with published weights.
_SD_DIMS = {320: 5, 640: 5, 1280: 6}
PUBLISHED = (
    (768, _SD_DIMS, "Yuanshi/LinFusion-1-5"),
    (1024, _SD_DIMS, "Yuanshi/LinFusion-2-1"),
    (2048, {640: 10, 1280: 60}, "Yuanshi/LinFusion-XL"),
)


def find_weights(
    unet: nn.Module, report: SwapReport, pipe_name_path: str | Path | None = None
) -> str:
    """Path or Hub id of the weights: a `linfusion` folder beside the model, or published ones.

    Args:
        unet: The UNet.
        report: Its spatial self-attention, as `plan` found it.
        pipe_name_path: Where the pipeline was loaded from.

    Raises:
        AdapterError: If no weights are known.
    """
    config: Any = getattr(unet, "config", {})
    # A UNet that was loaded by itself sits in the pipeline's folder, as "unet".
    own_path = config.get("_name_or_path")
    folders = [Path(pipe_name_path)] if pipe_name_path else []
    folders += [Path(own_path).parent] if own_path else []
    for folder in folders:
        if (folder / "linfusion" / "config.json").is_file():
            return str(folder / "linfusion")

    cross_dim = config.get("cross_attention_dim")
    dims: dict[int, int] = {}
    for entry in report.swapped:
        dim = entry.heads * entry.head_dim
        dims[dim] = dims.get(dim, 0) + 1
    for published_cross_dim, published_dims, repository in PUBLISHED:
        if cross_dim == published_cross_dim and dims == published_dims:
            return repository
    raise AdapterError(
        f"No LinFusion weights are known for this UNet (cross_attention_dim={cross_dim}, "
        f"{len(report.swapped)} spatial attn1). Pass pretrained_model_name_or_path=, or "
        "load_pretrained=False to start from the UNet's own weights."
    )
