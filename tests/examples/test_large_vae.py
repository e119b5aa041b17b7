"""examples/large_vae.py: tiles of the autoencoder make the picture that it makes in one piece."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from large_vae import blend, enable_large_pictures, reduced, shared_statistics  # noqa: E402
from scenes import render, sample_scenes  # noqa: E402

TILE = 256
# Pixels: tiles begin every 192, so the last columns are a tile of half a rim's width.
HEIGHT, WIDTH = 448, 392
GREY = 1 / 127.5  # a level of 255, as the autoencoder's pictures go from -1 to 1


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def vae():
    return AutoencoderKL.from_pretrained(EXAMPLES / "tiny_sd" / "vae", torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def picture():
    """A scene with ground alone in some tiles and objects in others."""
    square = render(sample_scenes(1, seed=3), HEIGHT) * 2 - 1
    return square[..., :WIDTH].contiguous()


def in_one_piece(vae, picture, latents):
    """Latents of the picture and picture of the latents, untiled, with the statistics of tiles."""
    with shared_statistics(vae.encoder):
        vae.encoder(reduced(picture, TILE))
        encoded = vae.quant_conv(vae.encoder(picture)).chunk(2, 1)[0]
    with shared_statistics(vae.decoder):
        vae.decoder(vae.post_quant_conv(reduced(latents, TILE // 4)))
        return encoded, vae.decoder(vae.post_quant_conv(latents))


def test_tiles_make_the_picture_of_one_piece(vae, picture):
    latents = vae.encode(picture).latent_dist.mean
    encoded, decoded = in_one_piece(vae, picture, latents)
    enable_large_pictures(vae, TILE)
    assert (vae.encode(picture).latents - encoded).abs().max() < 0.01  # of a deviation of 0.7
    difference = (vae.decode(latents).sample - decoded).abs()
    assert difference.max() < GREY and difference.mean() < 0.01 * GREY


def test_shared_statistics_are_near_the_whole_pictures(vae, picture):
    latents = vae.encode(picture).latent_dist.mean
    whole = vae.decode(latents).sample
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = TILE // 4, TILE
    alone = (vae.decode(latents).sample - whole).abs().mean()
    enable_large_pictures(vae, TILE)
    shared = (vae.decode(latents).sample - whole).abs().mean()
    assert shared < GREY and alone > 10 * GREY


def test_small_pictures_are_as_before(vae, picture):
    small = picture[..., :TILE, :TILE]
    latents = vae.encode(small).latent_dist.mean
    decoded = vae.decode(latents).sample
    enable_large_pictures(vae, TILE)
    assert torch.equal(vae.encode(small).latents, latents)
    assert torch.equal(vae.decode(latents).sample, decoded)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_every_later_input_has_the_first_ones_statistics(dtype, error):
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(4, 8)
    norm.weight.copy_(torch.randn(8, generator=generator))
    norm.bias.copy_(torch.randn(8, generator=generator))
    x = 5 + torch.randn(2, 8, 6, 7, generator=generator)
    expected = norm(x)
    with shared_statistics(norm.to(dtype)):
        first = norm(x.to(dtype))
        part = norm(x[..., :3].to(dtype))
        tokens = norm(x.flatten(2).to(dtype))  # as attention has it
    assert first.dtype == dtype
    assert (first - expected).abs().max() < error * expected.abs().max()
    assert torch.equal(part, first[..., :3]) and torch.equal(tokens, first.flatten(2))
    assert torch.equal(norm.float()(x[..., :3]), nn.GroupNorm.forward(norm, x[..., :3]))


@pytest.mark.parametrize("dim", [2, 3])
def test_tiles_are_blended_in_the_middle_of_their_overlap(dim):
    ones, twos = torch.ones(1, 1, 16, 16), torch.full((1, 1, 16, 16), 2.0)
    along = [1.0, 1.0, 1.125, 1.375, 1.625, 1.875, 2.0, 2.0] + [2.0] * 8
    blended = blend(dim, ones, twos.clone(), 8).movedim(dim, -1)
    assert torch.equal(blended, torch.tensor(along).expand(1, 1, 16, 16))
    narrow = twos.narrow(dim, 0, 8).clone()
    assert torch.equal(blend(dim, ones, narrow, 8), ones.narrow(dim, 0, 8))


def test_a_picture_is_reduced_to_a_tile():
    assert reduced(torch.ones(1, 3, 300, 1000), 512).shape == (1, 3, 154, 512)
    assert reduced(torch.ones(1, 3, 1024, 1), 512).shape == (1, 3, 512, 1)
    assert reduced(torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]]), 1).item() == 3
