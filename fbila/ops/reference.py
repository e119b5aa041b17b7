"""The specification: both operators in eager PyTorch, on any device, differentiable.

It computes in float32 at least (float64 stays float64) and returns the input dtype. Every kernel
is held to it, and it runs wherever the kernels do not.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from .feature_maps import FEATURE_MAPS


def linear_attn_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str | None,
    normalizer: str,
    eps: float,
) -> torch.Tensor:
    """`phi(q) [sum phi(k)^T v / M] / (phi(q) . [sum phi(k) / M] + eps)`, or `.../ sum` alike."""
    M = max(k.shape[-2], 1)
    with _without_autocast(q):
        phi_q, phi_k, values = _features(q, k, v, feature_map)
        # Both normalizers divide by M, so that sums stay near one; only eps tells them apart.
        kv = phi_k.transpose(-1, -2) @ values / M
        key_mean = phi_k.sum(-2) / M
        denominator = phi_q @ key_mean.unsqueeze(-1) + (eps if normalizer == "mean" else eps / M)
        if k.shape[-2] == 0:
            # No keys, no output: 0, not 0 / 0 where eps = 0.
            denominator = denominator + 1
        return _like_query(phi_q @ kv / denominator, q)


def simple_la_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str | None, scale: float
) -> torch.Tensor:
    """`scale * phi(q) [sum phi(k)^T v]`."""
    with _without_autocast(q):
        phi_q, phi_k, values = _features(q, k, v, feature_map)
        kv = phi_k.transpose(-1, -2) @ values * scale
        return _like_query(phi_q @ kv, q)


def _without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Autocast would take the float32 products back to half precision."""
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _features(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    phi = FEATURE_MAPS[feature_map]
    return phi(q.to(dtype)), phi(k.to(dtype)), v.to(dtype)


def _like_query(o: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`o` in q's dtype and memory order: token-major where q is."""
    o = o.to(q.dtype)
    if q.stride(1) < q.stride(2):
        return o.transpose(1, 2).contiguous().transpose(1, 2)
    return o
