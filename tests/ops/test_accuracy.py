"""Forward and backward err no more than a small multiple of what plain PyTorch errs.

A thinned grid of shapes runs through the interpreter, a fuller one on a GPU.
"""

import pytest
import torch
from helpers import CUDA, DTYPES, LOW, MEAN, SIMPLE, SUM, VARIANTS, assert_accurate, make_qkv

# (K, V): powers of two and none, one tile and several, equal and not.
HEAD_DIMS = [
    (1, 1), (1, 64), (3, 16), (16, 3), (17, 32), (32, 17), (36, 36), (40, 40), (64, 64), (72, 72),
    (80, 80), (96, 112), (112, 17), (128, 128), (40, 160), (256, 16), (1, 256),
]  # fmt: skip
if CUDA:
    HEAD_DIMS += [(32, 32), (48, 80), (96, 96), (112, 112), (128, 64), (160, 160), (256, 256)]

# (N, M): around the edges of a tile of 16, 32 or 64 tokens.
LENGTHS = [(17, 65), (1, 1), (2, 15), (64, 16), (63, 33), (65, 64), (127, 2), (15, 127)]
if CUDA:
    LENGTHS += [(1000, 4097), (4096, 77), (1, 1000), (4097, 513)]

GRID = [(*LENGTHS[i % len(LENGTHS)], K, V, VARIANTS[i % 3]) for i, (K, V) in enumerate(HEAD_DIMS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M, K, V, variant", GRID)
def test_head_dims_and_lengths(N, M, K, V, variant, dtype, two_kernels):
    assert_accurate(*make_qkv((1, 2, N, M, K, V), dtype, variant=variant), variant)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
@pytest.mark.parametrize("N, M", [(7, 1100), (1100, 7)])
def test_sums_over_several_programs(N, M, variant, dtype):
    assert_accurate(*make_qkv((1, 2, N, M, 16, 8), dtype, variant=variant), variant)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
def test_long_runs_of_one_program(variant, dtype, monkeypatch):
    # As with many rows, a program then goes over several tiles of tokens.
    monkeypatch.setattr("fbila.ops.kernels.tiling.ENOUGH_PROGRAMS", 1)
    assert_accurate(*make_qkv((1, 2, 333, 260, 16, 8), dtype, variant=variant), variant)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    "shape, variant",
    [
        ((2, 8, 4096, 4096, 40, 40), MEAN),  # Stable Diffusion 1.5, 512 px, first level
        ((2, 8, 1024, 1024, 80, 80), MEAN),
        ((2, 8, 256, 256, 160, 160), MEAN),
        ((2, 10, 4096, 4096, 64, 64), MEAN),  # SDXL, 1024 px
        ((2, 10, 4096, 77, 64, 64), MEAN),  # its text
        ((2, 16, 256, 256, 72, 72), SIMPLE),  # DiT-XL/2
        ((1, 70, 1024, 1024, 32, 32), SUM),  # SANA
        ((512, 3, 49, 49, 32, 32), MEAN),  # windows
    ],
    ids=str,
)
def test_published_shapes(shape, variant, dtype):
    assert_accurate(*make_qkv(shape, dtype, variant=variant), variant)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)
def test_16k_tokens(variant, dtype):
    assert_accurate(*make_qkv((1, 4, 16384, 16384, 64, 64), dtype, variant=variant), variant)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("tokens", [262_144, 1_048_576])
def test_very_many_tokens(tokens, dtype):
    assert_accurate(*make_qkv((1, 2, tokens, tokens, 64, 64), dtype), MEAN)
