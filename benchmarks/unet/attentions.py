"""The ways to compute a UNet's spatial self-attention, put into one UNet in turns.

    sdpa                the UNet as it comes: softmax attention
    official            LinFusion's layer in eager PyTorch (official.py)
    fbila               LinFusion mounted
    fbila fused         after `linfusion.fuse()`
    fbila fused blocks  that, in `fbila.adapters.fused_blocks`; in training, where `fuse()` has no
                        gradients, LinFusion mounted in it
    fbila low memory    LinFusion mounted, in `fbila.adapters.low_memory`

All but sdpa compute the same function of the same weights.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fbila import LinFusion
from fbila.adapters import fused_blocks, low_memory

from .official import OfficialAttention

# See `draw_weights`.
GAIN = 4.0


class Attentions:
    """One UNet with LinFusion's layers, fbila's and the official ones of equal weights.

    Attributes:
        unet: As it comes, outside of `put_in`.
        linfusion: Not mounted.
        official: Path in the UNet -> layer; layers with weights of their own, equal to fbila's.
    """

    def __init__(self, unet: nn.Module, mid_dim_scale: int | None) -> None:
        self.unet = unet
        self.linfusion = LinFusion.construct_for(
            unet=unet, load_pretrained=False, mid_dim_scale=mid_dim_scale
        )
        self.linfusion.unmount()
        draw_weights(self.linfusion)
        self.linfusion.requires_grad_(False)
        self.official = {
            found["module_name"]: _official_like(layer, found)
            for layer, found in zip(
                self.linfusion.layers, self.linfusion.config["modules_list"], strict=True
            )
        }

    def put_in(self, name: str, *, training: bool = False) -> AbstractContextManager[None]:
        """The UNet computes attention this way inside the block; Absent where it cannot."""
        if training and name == "fbila fused blocks":
            return self.mounted_in_fused_blocks()
        return WAYS[name](self)

    def layers(self, name: str) -> nn.Module:
        """What is trained in this way."""
        return nn.ModuleList(self.official.values()) if name == "official" else self.linfusion

    def softmax(self, name: str) -> AbstractContextManager[None]:
        """Inside `put_in(name)`: the UNet as it comes, for the block."""
        if name == "official":
            return _replaced(self.unet, self._originals)
        return self.linfusion.disabled()

    @contextmanager
    def put_in_official(self) -> Iterator[None]:
        self._originals = {name: self.unet.get_submodule(name) for name in self.official}
        with _replaced(self.unet, self.official):
            yield

    @contextmanager
    def mounted(self) -> Iterator[None]:
        self.linfusion.mount_to(unet=self.unet)
        try:
            yield
        finally:
            self.linfusion.unmount()

    @contextmanager
    def fused(self) -> Iterator[None]:
        with self.mounted():
            self.linfusion.fuse()
            try:
                yield
            finally:
                self.linfusion.unfuse()

    @contextmanager
    def with_fused_blocks(self) -> Iterator[None]:
        with self.fused(), fused_blocks(self.unet):
            yield

    @contextmanager
    def mounted_in_fused_blocks(self) -> Iterator[None]:
        with self.mounted(), fused_blocks(self.unet):
            yield

    @contextmanager
    def with_low_memory(self) -> Iterator[None]:
        with self.mounted(), low_memory(self.unet):
            yield


WAYS: dict[str, Callable[[Attentions], AbstractContextManager[None]]] = {
    "sdpa": lambda attentions: nullcontext(),
    "official": Attentions.put_in_official,
    "fbila": Attentions.mounted,
    "fbila fused": Attentions.fused,
    "fbila fused blocks": Attentions.with_fused_blocks,
    "fbila low memory": Attentions.with_low_memory,
}


@torch.no_grad()
def draw_weights(linfusion: LinFusion) -> None:
    """Weights under which the UNet's output depends on all that a layer computes.

    LinFusion starts with its non-linear projections at zero. And with PyTorch's own scale of
    projections, attention is next to uniform: SD 1.5's output changes by 2 % if softmax takes the
    place of linear attention, and by less if queries are taken for keys. With these it changes by
    70 %, and by no less than 3 % for every mistake that was tried.
    """
    torch.manual_seed(2)
    for layer in linfusion.layers:
        for nonlinear in (layer.to_q_, layer.to_k_):
            nonlinear[3].reset_parameters()
        for linear in (layer.to_q, layer.to_k, layer.to_out[0]):
            linear.weight.mul_(GAIN)


def _official_like(layer: Any, found: dict[str, Any]) -> OfficialAttention:
    weight = layer.to_q.weight
    with weight.device:
        official = OfficialAttention(found["dim_n"], found["heads"], found["projection_mid_dim"])
    official.to(weight.dtype).load_state_dict(layer.state_dict())
    return official.eval().requires_grad_(False)


@contextmanager
def _replaced(unet: nn.Module, modules: dict[str, nn.Module]) -> Iterator[None]:
    before = {name: unet.get_submodule(name) for name in modules}
    _place(unet, modules)
    try:
        yield
    finally:
        _place(unet, before)


def _place(unet: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, module)
