"""Both operators as a user of PyTorch would write them, computed in the dtype of the inputs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .cases import Case

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FEATURE_MAPS = {None: lambda x: x, "elu1": lambda x: F.elu(x) + 1, "relu": F.relu}
EPS = 1e-6


def eager(case: Case) -> Attention:
    phi = FEATURE_MAPS[case.feature_map]

    def simple_la(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (phi(q) * q.shape[-1] ** -0.5) @ (phi(k).transpose(-1, -2) @ v)

    def linear_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = phi(q), phi(k)
        # 1/M is shared by both factors, so that a long sum stays in the range of float16.
        root = k.shape[-2] ** -0.5
        kv = (k * root).transpose(-1, -2) @ (v * root)
        return q @ kv / (q @ k.mean(-2, keepdim=True).transpose(-1, -2) + EPS)

    return {"simple_la": simple_la, "linear_attn": linear_attn}[case.operator]
