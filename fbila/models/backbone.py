"""What hierarchical backbones have in common: stages one after the other, their features, a head.

Features are `(B, H, W, C)` from stage to stage, each on a grid of half the rows and columns of the
one before; what is asked for as features comes out as `(B, C, H, W)`, as timm has it.
"""

from collections.abc import Sequence

import torch
from timm.layers import create_classifier, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers.depthwise_conv import DepthwiseConv2d
from ..layers.layer_norm import LayerNorm
from ..layers.linear import Linear
from ..layers.pointwise_conv import PointwiseConv2d

for _leaf in (DepthwiseConv2d, LayerNorm, Linear, PointwiseConv2d):
    register_notrace_module(_leaf)


class Backbone(nn.Module):
    """Base of backbones with the interface of timm's: a subclass says what its stages are.

    It makes its stages, then calls `make_head`, and has `enter(i, x)`, what comes before the blocks
    of stage i, `blocks(i)`, and `keep_stages(n)`, which takes away those after the first n.

    Args:
        in_chans: Channels of the pictures.
        widths: Channels of each stage.
        patch_size: Rows and columns of the picture for one of the first grid.
        names: Name of the module whose output are the features of each stage.

    Attributes:
        feature_info: Channels, reduction and name of each stage.
    """

    output_fmt = "NHWC"
    norm: nn.Module

    def __init__(
        self, in_chans: int, widths: Sequence[int], patch_size: int, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_stages = len(widths)
        self.num_features = self.head_hidden_size = widths[-1]
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": width, "reduction": patch_size * 2**i, "module": name}
            for i, (width, name) in enumerate(zip(widths, names, strict=True))
        ]

    def make_head(self, num_classes: int, global_pool: str, drop_rate: float, **factory) -> None:
        """Makes the classifier."""
        self.num_classes = num_classes
        self.global_pool, self.head_drop, self.head = create_classifier(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            input_fmt=self.output_fmt,
            drop_rate=drop_rate,
            **factory,
        )

    def enter(self, stage: int, x: Tensor) -> Tensor:
        """The grid of a stage `(B, H, W, C)`, from that of the stage before or from pictures."""
        raise NotImplementedError

    def blocks(self, stage: int) -> nn.Sequential:
        """The blocks of a stage."""
        raise NotImplementedError

    def keep_stages(self, kept: int) -> None:
        """Takes away the stages after the first so many."""
        raise NotImplementedError

    def forward_stage(self, stage: int, x: Tensor) -> Tensor:
        """`(B, H, W, C)` of a stage, from that of the stage before or from pictures."""
        x = self.enter(stage, x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks(stage), x)
        return self.blocks(stage)(x)

    def forward_norm(self, x: Tensor) -> Tensor:
        """What comes after the last stage."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures `(B, in_chans, H, W)` to the last features `(B, H', W', C)`."""
        for stage in range(self.num_stages):
            x = self.forward_stage(stage, x)
        return self.forward_norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last features to `(B, num_classes)`, or to what the classifier is given."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures `(B, in_chans, H, W)` to `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features of some stages, and the last.

        Args:
            x: Pictures `(B, in_chans, H, W)`.
            indices: Which stages; a number means so many from the end, None all of them.
            norm: Applies the last norm to the features of the last stage.
            stop_early: Leaves out the stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC", of the features of the stages.
            intermediates_only: Returns these alone.

        Returns:
            The last features `(B, H', W', C)` and a list of those asked for, or the list alone.

        Raises:
            ValueError: If `output_fmt` is neither of the two.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NHWC", got {output_fmt!r}')
        taken, last = feature_take_indices(self.num_stages, indices)
        intermediates = []
        stages = last + 1 if stop_early else self.num_stages
        for stage in range(stages):
            x = self.forward_stage(stage, x)
            if stage in taken:
                y = self.forward_norm(x) if norm and stage == self.num_stages - 1 else x
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return (self.forward_norm(x) if stages == self.num_stages else x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Takes away what the features of some stages do not need.

        Args:
            indices: Which stages, as in `forward_intermediates`.
            prune_norm: The last norm too.
            prune_head: The classifier too.

        Returns:
            The stages, counted from the first.
        """
        taken, last = feature_take_indices(self.num_stages, indices)
        shorter = last + 1 < self.num_stages
        if shorter:
            self.keep_stages(last + 1)
            self.num_stages = last + 1
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the blocks again in the backward pass, and keeps only what is between them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier; the identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new classifier in the place of the old one; without classes the identity.

        Args:
            num_classes: Classes.
            global_pool: How features are pooled; None: as before.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        factory = get_device_dtype(self)
        self.make_head(num_classes, pool, self.head_drop.p, **factory)
        self.head.train(self.training)


def init_linear(module: nn.Module) -> None:
    """The initial weights of Swin and PVT."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
