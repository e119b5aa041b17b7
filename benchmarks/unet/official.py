"""LinFusion's attention layer in eager PyTorch, in the order of the published code's operations.

    F(x) = W_2 LeakyReLU(LayerNorm(W_1 x + b_1)) + b_2        one for queries, one for keys
    q = elu(W_q (x + F_q(x))) + 1      k = elu(W_k (x + F_k(x))) + 1      v = W_v x
    o_i = q_i mean_j(k_j^T v_j) / (q_i . mean_j(k_j) + 1e-4)              y = W_o o + b_o

Liu et al., "LinFusion: 1 GPU, 1 Minute, 16K Image", https://arxiv.org/abs/2409.02097.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class OfficialAttention(nn.Module):
    """`(B, N, C)` to `(B, N, C)`, with parameters under the names of the published checkpoints.

    As in the published layer, heads become part of the batch (by copies, where that needs them).
    """

    def __init__(self, dim: int, heads: int, mid_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.to_q_, self.to_k_ = (_nonlinear(dim, mid_dim or dim) for _ in range(2))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        n = hidden_states.shape[1]
        query = self.to_q(hidden_states + self.to_q_(hidden_states))
        key = self.to_k(hidden_states + self.to_k_(hidden_states))
        value = self.to_v(hidden_states)
        q, k, v = (self._split(x) for x in (query, key, value))
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        z = q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-4
        # 1/n is shared by both factors, so that a long sum stays in the range of float16.
        kv = (k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
        project, dropout = self.to_out
        return dropout(project(self._join(q @ kv / z)))

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B * H, N, D)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)

    def _join(self, x: Tensor) -> Tensor:
        """(B * H, N, D) -> (B, N, C)"""
        return x.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)


def _nonlinear(dim: int, mid_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, mid_dim),
        nn.LayerNorm(mid_dim),
        nn.LeakyReLU(inplace=True),
        nn.Linear(mid_dim, dim),
    )
