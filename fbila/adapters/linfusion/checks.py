"""Whether LinFusion's layers fit a UNet, and whether its own can be replaced without loss."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..carry import require_carriable
from ..hooks import casting, offloaded
from ..lora import plain, tuners
from ..report import AdapterError, SwapReport
from ..swap import KEPT


def require_kept(keep_original: str) -> None:
    """Refuses a place for originals that there is none of.

    Raises:
        AdapterError: If it is none of `KEPT`.
    """
    if keep_original not in KEPT:
        choices = ", ".join(f'"{kept}"' for kept in KEPT)
        raise AdapterError(f"keep_original must be one of {choices}, got {keep_original!r}.")


def require_fit(modules_list: list[dict[str, Any]], report: SwapReport) -> None:
    """Every layer must have a spatial self-attention of the same channels and heads to replace.

    Args:
        modules_list: The layers' configuration.
        report: The UNet's attention, as `plan` found it.

    Raises:
        AdapterError: If one has not.
    """
    ours = {m["module_name"]: (m["dim_n"], m["heads"]) for m in modules_list}
    theirs = {e.name: (e.heads * e.head_dim, e.heads) for e in report.swapped}
    misfits = [name for name, shape in ours.items() if theirs.get(name) != shape]
    if misfits:
        raise AdapterError(
            f"This LinFusion checkpoint is for {len(ours)} modules of dims {_values(ours, 0)} "
            f"and heads {_values(ours, 1)}; the UNet has {len(theirs)} of dims "
            f"{_values(theirs, 0)} and heads {_values(theirs, 1)}. Nothing was mounted. "
            f"(The first that does not fit is {misfits[0]}.)"
        )


def require_usable(unet: nn.Module, names: Iterable[str], *, copied: bool = False) -> None:
    """The layers to be replaced must hold nothing that would be lost.

    Args:
        unet: The UNet.
        names: Paths of its attention layers.
        copied: Whether their weights are to be copied into the new layers.

    Raises:
        AdapterError: If one carries a LoRA that cannot be carried over or a hook, is offloaded
            layer by layer, or is quantised where it is to be copied.
    """
    for name in names:
        module = unet.get_submodule(name)
        require_carriable(name, module)
        for child in ("to_q", "to_k", "to_v", "to_out.0") if copied else ():
            linear: Any = plain(module.get_submodule(child))
            kind = type(linear.weight.data)
            # torchao's weights say that they are floating point, and are no plain tensors.
            if not linear.weight.is_floating_point() or kind is not torch.Tensor:
                raise AdapterError(
                    f"{child} is {type(linear).__name__} with {kind.__name__} weights of "
                    f"{linear.weight.dtype}: they cannot be copied into a new layer. Call "
                    "dequantize() on the UNet first, or load LinFusion's own weights."
                )


def require_fusible(layer: Any) -> None:
    """The projections of a layer must be its own plain weights, where they can be read.

    Raises:
        AdapterError: If they are not.
    """
    require_carriable(layer.name, layer)
    for child, tuner in tuners(layer).items():
        raise AdapterError(
            f"{layer.name}.{child} carries a {type(tuner).__name__} of peft. Call "
            "pipeline.fuse_lora() and pipeline.unload_lora_weights() first, so that it is in the "
            "weights."
        )
    if casting(layer) is not None or offloaded(layer):
        raise AdapterError(
            f"{layer.name} is under layerwise casting or group offloading, which move its weights "
            "one by one. Fuse without them."
        )


def _values(shapes: dict[str, tuple[int, int]], position: int) -> str:
    values = sorted({shape[position] for shape in shapes.values()})
    return str(values[0]) if len(values) == 1 else "{" + ",".join(map(str, values)) + "}"
