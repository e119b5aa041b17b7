"""Layers over tokens in the operations of their official code: one PyTorch operation after another.

Each is the forward pass of a layer of `fbila.layers`, with that layer's parameters. What the
official code keeps in a buffer for its resolution is made once, in `kept`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import swin_transformer
from torch import Tensor

from fbila.layers.axial_rotary import axial_rotary


def kept(layer: Any, key: tuple, make: Callable[[], Tensor]) -> Tensor:
    """What an official layer has in a buffer, made at the first call of a size.

    By plain attributes, which a compiler can follow: it is to see one graph, as of the official
    code.
    """
    if not hasattr(layer, "official_buffers"):
        layer.official_buffers = {}
    if key not in layer.official_buffers:
        layer.official_buffers[key] = make()
    return layer.official_buffers[key]


def sides(x: Tensor, H: int | None, W: int | None) -> tuple[int, int]:
    side = int(x.shape[1] ** 0.5)
    return H or side, W or side


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, C)` -> `(B, heads, N, d)`."""
    B, N, C = x.shape
    return x.reshape(B, N, heads, C // heads).permute(0, 2, 1, 3)


def normalised(
    q: Tensor, k: Tensor, v: Tensor, q_turned: Tensor | None = None, k_turned: Tensor | None = None
) -> Tensor:
    """The lines that MLLA, FLatten, PolaFormer and RALA share."""
    n = k.shape[-2]
    q_turned, k_turned = q if q_turned is None else q_turned, k if k_turned is None else k_turned
    z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
    kv = (k_turned.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
    return q_turned @ kv * z


def shared_convolution(layer: Any, v: Tensor, H: int, W: int) -> Tensor:
    """FLatten's and PolaFormer's: the heads of `(B, heads, N, d)` are batch items. `(B, N, C)`."""
    B, heads, N, d = v.shape
    grid = v.reshape(B * heads, H, W, d).permute(0, 3, 1, 2)
    return layer.dwc(grid).reshape(B, heads * d, N).permute(0, 2, 1)


def mlla(
    self: Any, x: Tensor, H: int | None = None, W: int | None = None, rotary: Any = None
) -> Tensor:
    B, N, C = x.shape
    H, W = sides(x, H, W)
    heads = self.num_heads

    def rotations() -> Tensor:
        cos, sin, *_ = axial_rotary(H, W, C, device=x.device)
        return torch.stack((cos, sin), -1).view(H, W, C // 2, 2)

    table = kept(self, (H, W), rotations)

    def turn(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.float().reshape(B, H, W, C // 2, 2))
        turned = torch.view_as_real(torch.view_as_complex(table) * pairs).flatten(-2)
        return split_heads(turned.reshape(B, N, C).to(t.dtype), heads)

    qk = self.qk(x).reshape(B, N, 2, C).permute(2, 0, 1, 3)
    q, k, v = F.elu(qk[0]) + 1.0, F.elu(qk[1]) + 1.0, x
    out = normalised(*(split_heads(t, heads) for t in (q, k, v)), turn(q), turn(k))
    out = out.transpose(1, 2).reshape(B, N, C)
    local = self.lepe(v.reshape(B, H, W, C).permute(0, 3, 1, 2))
    return out + local.permute(0, 2, 3, 1).reshape(B, N, C)


def focused(self: Any, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
    B, N, C = x.shape
    H, W = sides(x, H, W)
    q, k, v = self.qkv(x).reshape(B, N, 3, C).permute(2, 0, 1, 3).unbind(0)
    k = k + self.positional_encoding
    scale = F.softplus(self.scale)
    q, k = (F.relu(q) + 1e-6) / scale, (F.relu(k) + 1e-6) / scale
    q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
    q, k = q**self.focusing_factor, k**self.focusing_factor
    q = q / q.norm(dim=-1, keepdim=True) * q_norm
    k = k / k.norm(dim=-1, keepdim=True) * k_norm
    q, k, v = (split_heads(t.to(x.dtype), self.num_heads) for t in (q, k, v))
    out = normalised(q, k, v).transpose(1, 2).reshape(B, N, C)
    return self.proj_drop(self.proj(out + shared_convolution(self, v, H, W)))


def pola(self: Any, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
    B, N, C = x.shape
    H, W = sides(x, H, W)
    q, k, v, gate = self.qkvg(x).reshape(B, N, 4, C).permute(2, 0, 1, 3).unbind(0)
    k = k + self.positional_encoding
    scale, power = F.softplus(self.scale), 1 + self.alpha * torch.sigmoid(self.power)
    q, k, v = (split_heads(t, self.num_heads) for t in (q / scale, k / scale, v))
    q_plus, q_minus, k_plus, k_minus = ((F.relu(t) ** power).to(v.dtype) for t in (q, -q, k, -k))
    keys = torch.cat((k_plus, k_minus), -1)
    v_same, v_opposite = v.chunk(2, -1)
    same = normalised(torch.cat((q_plus, q_minus), -1), keys, v_same)
    opposite = normalised(torch.cat((q_minus, q_plus), -1), keys, v_opposite)
    out = torch.cat((same, opposite), -1).transpose(1, 2).reshape(B, N, C)
    out = out + shared_convolution(self, v, H, W)
    return self.proj_drop(self.proj(out * gate))


def pola_pp(
    self: Any, x: Tensor, H: int | None = None, W: int | None = None, rotary: Any = None
) -> Tensor:
    B, N, C = x.shape
    H, W = sides(x, H, W)
    heads = self.num_heads
    q, k, v, gate = self.qkvg(x).reshape(B, N, 4, C).permute(2, 0, 1, 3).unbind(0)
    local = self.lepe(v.reshape(B, H, W, C).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    s_1, s_2 = torch.sigmoid(self.s1), torch.sigmoid(self.s2)
    signs = torch.cat((F.relu(q), F.relu(-q)), -1)
    swapped = torch.cat((F.relu(-q), F.relu(q)), -1)
    keys = (torch.exp(torch.cat((F.relu(k), F.relu(-k)), -1)) - 1).to(v.dtype)
    same, opposite = ((torch.exp(t * s) - 1).to(v.dtype) for t, s in ((signs, s_1), (swapped, s_2)))
    sin, cos = sines(self, H, W, 2 * C // heads, x.device)
    turn = lambda t: theta_shift(t, sin, cos)  # noqa: E731
    v_1, v_2 = v.chunk(2, -1)
    out = torch.cat(
        (
            normalised(same, keys, v_1, turn(same), turn(keys)),
            normalised(opposite, keys, v_2, turn(opposite), turn(keys)),
        ),
        -1,
    )
    out = out.transpose(1, 2).reshape(B, N, C) + local
    return self.proj(out * gate)


def inline(self: Any, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
    B, N, C = x.shape
    H, W = sides(x, H, W)
    heads = self.num_heads
    q, k, v = self.qkv(x).reshape(B, N, 3, C).permute(2, 0, 1, 3).unbind(0)
    q, k, v_heads = (split_heads(t, heads) for t in (q, k, v))
    effective = (C // heads) ** -0.5 / N
    kv = (k.transpose(-2, -1) * effective) @ v_heads
    mean = v_heads.mean(dim=2, keepdim=True)
    # What makes the weights add up to one.
    rest = 1 - q @ (k.sum(dim=2, keepdim=True) * effective).transpose(-2, -1)
    out = (q @ kv + rest * mean).transpose(1, 2).reshape(B, N, C)
    kernels = self.residual(x.mean(dim=1).unsqueeze(-1)).reshape(B * C, 1, 3, 3)
    grid = v.transpose(1, 2).reshape(1, B * C, H, W)
    local = F.conv2d(grid, kernels, padding=1, groups=B * C).reshape(B, C, N).permute(0, 2, 1)
    return self.proj_drop(self.proj(out + local))


def ssd(self: Any, x: Tensor, H: int | None = None, W: int | None = None) -> Tensor:
    B, N, _ = x.shape
    H, W = sides(x, H, W)
    heads, states = self.num_heads, self.d_state
    z, mixed, dt = self.in_proj(x).split((self.d_inner, self.d_inner + 2 * states, heads), -1)
    grid = mixed.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous()
    mixed = F.silu(self.conv2d(grid)).permute(0, 2, 3, 1).reshape(B, N, -1).contiguous()
    v, k, q = mixed.split((self.d_inner, states, states), -1)
    v = v.reshape(B, N, heads, -1).permute(0, 2, 1, 3)
    steps = F.softplus(dt + self.dt_bias) * self.A_log.exp()
    weighed = v * steps.permute(0, 2, 1).unsqueeze(-1).to(v.dtype)
    k = k.reshape(B, 1, N, states).expand(-1, heads, -1, -1)
    q = q.reshape(B, 1, N, states).expand(-1, heads, -1, -1)
    state = k.transpose(-2, -1) @ weighed
    out = q @ state + v * self.D.view(1, heads, 1, 1)
    out = out.permute(0, 2, 1, 3).reshape(B, N, self.d_inner)
    return self.out_proj((self.norm(out) * z).to(x.dtype))


def windows(self: Any, x: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Swin's block around timm's attention, which takes windows."""
    _, H, W, _ = x.shape
    shifted = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
    rows, columns = self.window_size
    shifted = F.pad(shifted, (0, 0, 0, -W % columns, 0, -H % rows))
    size = shifted.shape[1:3]
    parts = swin_transformer.window_partition(shifted, self.window_size).flatten(1, 2)
    mask = None
    if any(shift):
        mask = kept(self, (*size, shift, x.dtype), lambda: hidden(x, size, self.window_size, shift))
    y = swin_transformer.WindowAttention.forward(self, parts, mask)
    y = y.unflatten(1, self.window_size)
    y = swin_transformer.window_reverse(y, self.window_size, *size)[:, :H, :W]
    return y.roll(shift, (1, 2)) if any(shift) else y


def hidden(
    x: Tensor, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """`(windows, T, T)`: -100 for tokens that only a shift has brought into one window."""
    regions = x.new_zeros(1, *size, 1)
    regions[:, size[0] - shift[0] :] += 2
    regions[:, :, size[1] - shift[1] :] += 1
    region = swin_transformer.window_partition(regions, window).flatten(1)
    return (region[:, :, None] != region[:, None, :]).to(x.dtype) * -100


def sana(self: Any, x: Tensor) -> Tensor:
    B, N, C = x.shape
    qkv = self.qkv(x).reshape(B, N, 3, C)
    q, k, v = qkv.unbind(2)
    q, k = self.q_norm(q).transpose(-1, -2), self.k_norm(k).transpose(-1, -2)
    heads = self.num_heads
    q, k, v = (t.reshape(B, heads, C // heads, N) for t in (q, k, v.transpose(-1, -2)))
    q, k = F.relu(q), F.relu(k.transpose(-1, -2))
    q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(x.device.type, enabled=False):
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        out = (v @ k) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + self.eps)
    return self.proj(out.to(x.dtype).reshape(B, C, N).permute(0, 2, 1))


def sines(layer: Any, H: int, W: int, dim: int, device: Any) -> tuple[Tensor, Tensor]:
    """sin and cos `(N, dim)` of RALA, MALA and PolaFormer++, each twice for a pair."""

    def tables() -> Tensor:
        cos, sin, *_ = axial_rotary(H, W, dim, endpoint=True, device=device)
        return torch.stack((sin, cos)).repeat_interleave(2, -1)

    sin, cos = kept(layer, (H, W, dim), tables).unbind(0)
    return sin, cos


def theta_shift(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
