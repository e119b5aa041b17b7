"""Layers over pictures in the operations of their official code, as in `official_tokens.py`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .official_tokens import normalised, sines, theta_shift


def projected(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v `(B, heads, N, d)`, the gate and the positional encoding of RALA and MALA."""
    B, C, H, W = x.shape
    qkvo = layer.qkvo(x)
    qkv, gate = qkvo[:, : 3 * C], qkvo[:, 3 * C :]
    local = layer.lepe(qkv[:, 2 * C :])
    heads = layer.num_heads
    q, k, v = qkv.reshape(B, 3, heads, C // heads, H * W).permute(1, 0, 2, 4, 3).unbind(0)
    return F.elu(q) + 1, F.elu(k) + 1, v, gate, local


def joined(layer: Any, out: Tensor, gate: Tensor, local: Tensor) -> Tensor:
    B, C, H, W = gate.shape
    out = out.permute(0, 1, 3, 2).reshape(B, C, H, W)
    return layer.proj((out + local) * gate)


def rala(self: Any, x: Tensor, rotary: Any = None) -> Tensor:
    H, W = x.shape[2:]
    q, k, v, gate, local = projected(self, x)
    sin, cos = sines(self, H, W, q.shape[-1], x.device)
    wish = q.mean(dim=2, keepdim=True) * self.scale
    weights = torch.softmax(wish @ k.transpose(-2, -1), -1).transpose(-2, -1) * (H * W)
    k = (k * weights).to(v.dtype)
    out = normalised(q, k, v, theta_shift(q, sin, cos), theta_shift(k, sin, cos))
    return joined(self, out, gate, local)


def mala(self: Any, x: Tensor, rotary: Any = None) -> Tensor:
    H, W = x.shape[2:]
    n = H * W
    q, k, v, gate, local = projected(self, x)
    sin, cos = sines(self, H, W, q.shape[-1], x.device)
    z = q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) * self.scale
    q, k = theta_shift(q, sin, cos), theta_shift(k, sin, cos)
    kv = (k.transpose(-2, -1) * (self.scale / n) ** 0.5) @ (v * (self.scale / n) ** 0.5)
    out = q @ kv * (1 + 1 / (z + 1e-6)) - z * v.mean(dim=2, keepdim=True)
    return joined(self, out, gate, local)


def lite_mla(self: Any, x: Tensor) -> Tensor:
    B, _, H, W = x.shape
    qkv = self.qkv(x)
    scales = torch.cat([qkv, *(aggregate(qkv) for aggregate in self.aggreg)], 1)
    with torch.autocast(x.device.type, enabled=False):
        # The official layer and timm's alike compute it in float32.
        scales = scales.float().reshape(B, -1, 3 * self.dim, H * W)
        q, k, v = scales.chunk(3, 2)
        q, k = F.relu(q), F.relu(k)
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        out = (v @ k.transpose(-1, -2)) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + self.eps)
    return self.proj(out.reshape(B, -1, H, W).to(qkv.dtype))
