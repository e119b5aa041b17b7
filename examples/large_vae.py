"""An autoencoder for large pictures: tile by tile, without seams.

`vae.enable_tiling()` alone lets every tile find its own statistics in every group norm. A tile of
bare ground then comes out in another colour than the tile beside it that holds an object; the
small autoencoder even turns a yellow ground orange. So the statistics are taken once, from the
whole picture reduced to one tile, and all tiles use these.

What differs then is a rim of every tile, beyond which its convolutions see zeros instead of the
picture. So neighbours are blended over the middle of their overlap only, and no rim is used.
With tiles of 512 pixels the small autoencoder then gives, to a hundredth of a grey level, what it
gives for the picture in one piece under the same statistics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn


def enable_large_pictures(vae: AutoencoderKL, tile: int) -> None:
    """Lets the autoencoder work through pictures larger than `tile` pixels in tiles of that size.

    Its encoding becomes the posterior's mean. Pipelines would draw a sample: the same for the
    published autoencoders, but the small one's spread is more noise than a late stage adds.
    """
    vae.enable_tiling()
    vae.tile_sample_min_size = tile
    vae.tile_latent_min_size = tile // 2 ** (len(vae.config.block_out_channels) - 1)
    encode, tiled_encode, tiled_decode = vae.encode, vae._tiled_encode, vae.tiled_decode

    def mean(picture: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=encode(picture).latent_dist.mode())

    def steady_encode(picture: Tensor) -> Tensor:
        with shared_statistics(vae.encoder):
            vae._encode(reduced(picture, vae.tile_sample_min_size))
            return tiled_encode(picture)

    def steady_decode(latents: Tensor, return_dict: bool = True):
        with shared_statistics(vae.decoder):
            vae._decode(reduced(latents, vae.tile_latent_min_size))
            return tiled_decode(latents, return_dict=return_dict)

    vae.encode, vae._tiled_encode, vae.tiled_decode = mean, steady_encode, steady_decode
    vae.blend_v, vae.blend_h = partial(blend, 2), partial(blend, 3)


def blend(dim: int, a: Tensor, b: Tensor, extent: int) -> Tensor:
    """Goes over from the end of `a` to the beginning of `b`, in the middle half of their overlap.

    A last tile that lies in `a` altogether is taken from there: it may be narrower than its rim.
    `b` is changed in place, as diffusers' own `blend_v` and `blend_h` do.
    """
    length = b.shape[dim]
    if length <= extent:
        return b.copy_(a.narrow(dim, a.shape[dim] - length, length))
    along = (torch.arange(extent, device=b.device) + 0.5) / extent
    weight = (2 * along - 0.5).clamp(0, 1).to(b.dtype).view(-1, *[1] * (3 - dim))
    b.narrow(dim, 0, extent).lerp_(a.narrow(dim, a.shape[dim] - extent, extent), 1 - weight)
    return b


def reduced(x: Tensor, side: int) -> Tensor:
    """The whole of `(n, c, h, w)`, its longer side averaged down to `side`."""
    height, width = x.shape[-2:]
    scale = side / max(height, width)
    return F.adaptive_avg_pool2d(x, (max(1, round(height * scale)), max(1, round(width * scale))))


@contextmanager
def shared_statistics(module: nn.Module) -> Iterator[None]:
    """In the block, every group norm keeps the statistics of its first input for all later ones."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.GroupNorm)]
    for norm in norms:
        norm.forward = partial(_normalise, norm, [])
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _normalise(norm: nn.GroupNorm, kept: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    if not kept:
        kept.append(_scale_and_shift(norm, x))
    scale, shift = (t.reshape(*t.shape, *[1] * (x.dim() - 2)) for t in kept[0])
    return torch.addcmul(shift, x, scale).to(x.dtype)


def _scale_and_shift(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """The group norm of `(n, c, ...)` as `x * scale + shift`, both `(n, c)`, in float32."""
    groups = x.float().reshape(x.shape[0], norm.num_groups, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    each = norm.num_channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(each, 1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(each, 1) * scale
    return scale, shift
