"""LinFusion's queries, keys and values from two products instead of seven, for inference.

    q = W_q (x + F_q(x)) = W_q x + W_q W_2 h_q + W_q b_2,    h_q = LeakyReLU(LayerNorm(W_1 x + b_1))

One product gives W_1 x for queries and keys, W_q x, W_k x and W_v x; one kernel both h; and one
batched product adds W_q W_2 h_q and W_k W_2 h_k in place. Exact but for rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.add_products_library import add_products_
from ..ops.norm_library import layer_norm_leaky_relu


class FusedProjections(nn.Module):
    """What `GeneralizedLinearAttention` projects its input to.

    Its buffers are made from the layer's weights as they are now, and are no part of a state dict.
    The layer's large weights become views of them, so that they are in memory once.

    Args:
        layer: With `to_q`, `to_k`, `to_v` and the nonlinear `to_q_`, `to_k_`.
    """

    weight: Tensor
    bias: Tensor | None
    second: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    @torch.no_grad()
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.dim, self.heads = layer.to_v.in_features, layer.heads
        pairs = ((layer.to_q, layer.to_q_), (layer.to_k, layer.to_k_))
        self.mid_dim = 0
        if isinstance(layer.to_q_, nn.Identity):
            weights = [*(2 * linear.weight for linear, _ in pairs), layer.to_v.weight]
            self.register_buffer("weight", torch.cat(weights), persistent=False)
            self.register_buffer("bias", None, persistent=False)
            return
        self.mid_dim = layer.to_q_[0].out_features
        self.eps, self.slope = layer.to_q_[1].eps, layer.to_q_[2].negative_slope
        shared = [
            *(f[0].weight for _, f in pairs),
            *(m.weight for m, _ in pairs),
            layer.to_v.weight,
        ]
        biases = [f[0].bias for _, f in pairs]
        products = []
        for linear, f in pairs:
            wide = linear.weight.double()
            products.append((wide @ f[3].weight.double()).T.to(linear.weight.dtype))
            biases.append((wide @ f[3].bias.double()).to(linear.weight.dtype))
        biases.append(torch.zeros_like(layer.to_v.weight[:, 0]))
        for name, tensor in (
            ("weight", torch.cat(shared)),
            ("bias", torch.cat(biases)),
            ("second", torch.stack(products)),
            ("norm_weight", torch.stack([f[1].weight for _, f in pairs])),
            ("norm_bias", torch.stack([f[1].bias for _, f in pairs])),
        ):
            self.register_buffer(name, tensor, persistent=False)
        rows = self.weight.split([len(w) for w in shared])
        for parameter, view in zip(shared, rows, strict=True):
            parameter.data = view

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(query, key, value) of x `(B, N, C)`, each a `(B, H, N, D)` view of a wider tensor."""
        y = F.linear(x, self.weight, self.bias)
        # Autocast leaves operations in place as they are, and they have no gradients.
        in_place = self.weight.dtype == y.dtype and not y.requires_grad
        return self._in_place(y) if in_place else self._elsewhere(y)

    def _in_place(self, y: Tensor) -> tuple[Tensor, ...]:
        """One call makes a view: at small sizes it is the host's time that counts."""
        B, N, width = y.shape
        mid, dim, head_dim = self.mid_dim, self.dim, self.dim // self.heads
        if mid:
            first = y.as_strided((2, B * N, mid), (mid, width, 1))
            add_products_(y, self._normed(first), self.second, 2 * mid)
        size, stride = (B, self.heads, N, head_dim), (N * width, head_dim, width, 1)
        return tuple(y.as_strided(size, stride, 2 * mid + i * dim) for i in range(3))

    def _elsewhere(self, y: Tensor) -> tuple[Tensor, ...]:
        mid, dim = self.mid_dim, self.dim
        first, both, value = y.split([2 * mid, 2 * dim, dim], -1)
        query, key = both.chunk(2, -1)
        if mid:
            first, both = (
                x.flatten(0, 1).unflatten(1, (2, -1)).transpose(0, 1) for x in (first, both)
            )
            both = torch.baddbmm(both, self._normed(first), self.second)
            query, key = both.unflatten(1, y.shape[:2])
        return tuple(x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))

    def _normed(self, x: Tensor) -> Tensor:
        return layer_norm_leaky_relu(x, self.norm_weight, self.norm_bias, self.eps, self.slope)
