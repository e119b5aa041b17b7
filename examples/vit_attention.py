"""Attention for `train_vit.py`, by name, in the place of a timm vision transformer's.

Each layer starts from the softmax layer's projections as far as it has them, be they trained or
as timm draws them, and gates start open.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbila.layers
from fbila.adapters.timm import AttentionSpec, swap
from fbila.layers import RALA, FocusedLinearAttention, MLLALinearAttention

# SiLU is 1 there.
OPEN = 1.2785
# How small values are made for SiLU, which is z / 2 + z^2 / 4 near 0.
SMALL = 0.5
# The least singular value of their projection that is inverted, as a part of the largest.
LEAST = 0.05


class MLLAMixer(nn.Module):
    """MLLA's layer and what its block has around it.

    y = W_out (attn(SiLU(dwc(W_in x))) * SiLU(W_a x))
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act_proj = nn.Linear(dim, dim)
        self.attn = MLLALinearAttention(dim, num_heads)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        u = self.in_proj(x).transpose(1, 2).unflatten(-1, (H, W))
        u = F.silu(self.dwc(u)).flatten(2).transpose(1, 2)
        mixed = self.attn(u, H, W)
        return self.out_proj(mixed * F.silu(self.act_proj(x)))


class ConvSoftmax(nn.Module):
    """Softmax with a depthwise 5 x 5 convolution of the values, as the linear layers have one.

    Without it, softmax alone has to learn from pictures what is next to what.
    """

    takes_pictures = True

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv.flatten(2).unflatten(1, (3, self.num_heads, -1)).mT.unbind(1)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.mT.reshape(x.shape) + self.lepe(qkv.chunk(3, 1)[2]))


@torch.no_grad()
def softmax_conv(spec: AttentionSpec) -> nn.Module:
    layer = ConvSoftmax(spec.dim, spec.heads)
    for name in ("qkv", "proj"):
        for kind, parameter in layer.get_submodule(name).named_parameters():
            theirs = spec.module.get_submodule(name).get_parameter(kind)
            parameter.copy_(theirs.view_as(parameter))
    return layer


@torch.no_grad()
def focused(spec: AttentionSpec) -> nn.Module:
    layer = FocusedLinearAttention(spec.dim, spec.heads, spec.qkv_bias, grid_size=spec.grid_size)
    layer.qkv.load_state_dict(spec.module.qkv.state_dict())
    layer.proj.load_state_dict(spec.module.proj.state_dict())
    return layer


@torch.no_grad()
def mlla(spec: AttentionSpec) -> nn.Module:
    layer = MLLAMixer(spec.dim, spec.heads)
    # Values are what in_proj makes; queries and keys are made of them, and have to be learned.
    for name, parameter in layer.in_proj.named_parameters():
        parameter.copy_(spec.module.qkv.get_parameter(name).chunk(3)[2])
    layer.out_proj.load_state_dict(spec.module.proj.state_dict())
    nn.init.trunc_normal_(layer.act_proj.weight, std=0.02)
    nn.init.constant_(layer.act_proj.bias, OPEN)
    return layer


@torch.no_grad()
def mlla_of_trained(spec: AttentionSpec) -> nn.Module:
    """As near as MLLA comes to linear attention by trained queries, keys and values of softmax.

    Its convolutions leave each pixel alone at first, and values, made small, pass SiLU as halves of
    themselves. Queries and keys are made of these values.
    """
    layer = mlla(spec)
    for conv in (layer.dwc, layer.attn.lepe):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    layer.dwc.weight[:, :, 1, 1] = 1
    layer.in_proj.weight.mul_(SMALL)
    layer.in_proj.bias.mul_(SMALL)
    layer.out_proj.weight.mul_(2 / SMALL)
    weight, bias, rows = spec.module.qkv.weight, spec.module.qkv.bias, 2 * spec.dim
    # What is read of x in directions that have next to no values is not to be had.
    of_values = weight[:rows] @ torch.linalg.pinv(weight[rows:], rtol=LEAST)
    layer.attn.qk.weight.copy_(2 / SMALL * of_values)
    layer.attn.qk.bias.copy_(bias[:rows] - of_values @ bias[rows:])
    return layer


@torch.no_grad()
def rala(spec: AttentionSpec) -> nn.Module:
    layer = RALA(spec.dim, spec.heads)
    dim = spec.dim
    for name, parameter in layer.qkvo.named_parameters():
        kernel = spec.module.qkv.get_parameter(name)
        parameter[: 3 * dim].copy_(kernel.view_as(parameter[: 3 * dim]))
    nn.init.trunc_normal_(layer.qkvo.weight[3 * dim :], std=0.02)
    nn.init.constant_(layer.qkvo.bias[3 * dim :], 1.0)
    for name, parameter in layer.proj.named_parameters():
        parameter.copy_(spec.module.proj.get_parameter(name).view_as(parameter))
    return layer


FACTORIES = {"softmax_conv": softmax_conv, "focused": focused, "mlla": mlla, "rala": rala}
# In a model that is trained.
OF_TRAINED = {**FACTORIES, "mlla": mlla_of_trained}


def put_in(model: nn.Module, name: str, trained: bool = False) -> nn.Module:
    """The model with another attention.

    Args:
        name: "softmax" or one of `FACTORIES`; a layer of `fbila.layers`; or a feature map, for
            linear attention by the parameters that are there.
        trained: Whether these are trained.
    """
    if name != "softmax":
        attention = (OF_TRAINED if trained else FACTORIES).get(name) or getattr(
            fbila.layers, name, name
        )
        swap(model, attention)
    return model
