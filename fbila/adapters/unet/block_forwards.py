"""The blocks of a Stable Diffusion UNet by kernels of fbila's: see `blocks.py`.

Each class is one of diffusers' or PyTorch's with another forward and nothing else, so that a module
changes from one to the other and back by its `__class__`. What kernels do not serve, as
`kernel_checks.py` tells, runs the stock forward.

Convolutions leave their bias to whatever reads their result next. Under autocast norms write at
once what the convolutions and linear maps behind them would cast float32 to.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.add_bias_library import add_bias
from ...ops.geglu_library import geglu
from ...ops.group_norm_library import group_norm
from ...ops.norm_library import layer_norm
from ..host import host
from ..kernel_checks import in_graph, plain, plain_norm, pointwise, read_by_maps, serves, takes

with host("diffusers"):
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel


def convolve(conv: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(x) without its bias, and the bias; with it, and None, where others act on `conv`."""
    if not plain(conv, nn.Conv2d):
        return conv(x), None
    return conv._conv_forward(x, conv.weight, None), conv.bias


def end(x: Tensor, residual: Tensor, *biases: Tensor | None) -> Tensor:
    """x + residual + biases `(C,)`; compilers make one kernel of it themselves."""
    if not torch.compiler.is_compiling():
        return add_bias(x, residual, *biases)
    for bias in biases:
        x = x if bias is None else x + bias.view(-1, 1, 1)
    return x + residual


class FusedResnetBlock2D(ResnetBlock2D):
    """Each norm with SiLU and what is added in front of it, and the end of the block."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._serves(input_tensor, temb):
            return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        norm1, norm2, dtype = self.norm1, self.norm2, read_by_maps(input_tensor)
        hidden = group_norm(
            input_tensor, None, None, norm1.weight, norm1.bias, norm1.num_groups, norm1.eps, True,
            dtype=dtype,
        )  # fmt: skip
        hidden, bias = convolve(self.conv1, hidden)
        shift = None
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        hidden = group_norm(
            hidden, shift, bias, norm2.weight, norm2.bias, norm2.num_groups, norm2.eps, True,
            dtype=dtype,
        )  # fmt: skip
        hidden, bias = convolve(self.conv2, hidden)
        residual, residual_bias = input_tensor, None
        if self.conv_shortcut is not None:
            residual, residual_bias = convolve(self.conv_shortcut, input_tensor)
        return end(hidden, residual, bias, residual_bias)

    def _serves(self, x: Tensor, temb: Any) -> bool:
        modules = self.norm1, self.norm2, self.conv1, self.conv2, self.conv_shortcut
        return (
            # A hook may have kept this forward beyond the module's time in this class.
            isinstance(self, FusedResnetBlock2D)
            and (serves(x, *modules) or in_graph(x, self.norm1))
            and plain_norm(self.norm1, nn.GroupNorm, x)
            and plain_norm(self.norm2, nn.GroupNorm, x)
            and plain(self.nonlinearity, nn.SiLU)
            and not (self.training and self.dropout.p)
            and (temb is None) == (self.time_emb_proj is None)
            and (temb is None or temb.ndim == 2)
        )

    @staticmethod
    def fits(block: Any) -> bool:
        """Whether a `ResnetBlock2D` is of the kind that this forward computes."""
        return (
            block.time_embedding_norm == "default"
            and block.upsample is None
            and block.downsample is None
            and block.output_scale_factor == 1
            and isinstance(block.nonlinearity, nn.SiLU)
            and isinstance(block.norm1, nn.GroupNorm)
            and isinstance(block.norm2, nn.GroupNorm)
        )


class FusedTransformer2DModel(Transformer2DModel):
    """The norm writes tokens, and the residual is added as tokens become a picture again."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        norm, project = self.norm, self.proj_in
        served = serves(hidden_states, norm, project) or in_graph(hidden_states, norm)
        if not (served and plain_norm(norm, nn.GroupNorm, hidden_states)):
            return super()._operate_on_continuous_inputs(hidden_states)
        as_linear = self.use_linear_projection or pointwise(project)
        normed = group_norm(
            hidden_states, None, None, norm.weight, norm.bias, norm.num_groups, norm.eps,
            channels_last=as_linear, dtype=read_by_maps(hidden_states),
        )  # fmt: skip
        if not as_linear:
            normed = project(normed)
        tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)
        if self.use_linear_projection:
            # Stock returns the width in front of the projection, which is no other.
            return project(tokens), tokens.shape[2]
        if as_linear:
            tokens = F.linear(tokens, project.weight.flatten(1), project.bias)
        return tokens, tokens.shape[2]

    def _get_output_for_continuous_inputs(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        batch_size: int,
        height: int,
        width: int,
        inner_dim: int,
    ) -> Tensor:
        project = self.proj_out
        as_linear = self.use_linear_projection or pointwise(project)
        served = serves(hidden_states, project) or in_graph(residual, self.norm)
        if not (as_linear and served and type(residual) is Tensor):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        bias = project.bias
        if not self.use_linear_projection:
            hidden_states = F.linear(hidden_states, project.weight.flatten(1))
        elif plain(project, nn.Linear):
            hidden_states = F.linear(hidden_states, project.weight)
        else:
            hidden_states, bias = project(hidden_states), None
        picture = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return end(picture, residual, bias)

    @staticmethod
    def fits(model: Any) -> bool:
        return model.is_input_continuous and isinstance(model.norm, nn.GroupNorm)


class FusedGEGLU(GEGLU):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        served = isinstance(self, FusedGEGLU) and serves(hidden_states, self.proj)
        if args or kwargs or not served:
            return GEGLU.forward(self, hidden_states, *args, **kwargs)
        return geglu(self.proj(hidden_states))


class FusedLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not (isinstance(self, FusedLayerNorm) and self._serves(input)):
            return nn.LayerNorm.forward(self, input)
        return layer_norm(input, self.weight, self.bias, self.eps, read_by_maps(input))

    def _serves(self, x: Tensor) -> bool:
        return serves(x, self) and (self.weight is None or takes(self.weight, x))

    @staticmethod
    def fits(norm: Any) -> bool:
        return len(norm.normalized_shape) == 1


class FusedGroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not (isinstance(self, FusedGroupNorm) and self._serves(input)):
            return nn.GroupNorm.forward(self, input)
        # The activation behind it is computed in what stock returns.
        dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else None
        return group_norm(
            input, None, None, self.weight, self.bias, self.num_groups, self.eps, dtype=dtype
        )

    def _serves(self, x: Tensor) -> bool:
        return (serves(x, self) or in_graph(x, self)) and takes(self.weight, x)

    @staticmethod
    def fits(norm: Any) -> bool:
        return norm.affine
