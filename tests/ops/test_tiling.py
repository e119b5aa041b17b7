"""Block sizes and splits cover every token exactly once, whatever else is in the batch."""

import inspect

import pytest
import torch
from helpers import MEAN, make_qkv, run

from benchmarks.cases import select
from fbila.ops.kernels import grad_feature, grad_key, grad_query, output, short, state
from fbila.ops.kernels.tiling import SCHEDULES, Tiling, require_float64_products

ALL_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HEAD_DIMS = [1, 3, 16, 17, 32, 40, 64, 72, 80, 96, 128, 160, 256]
TOKENS = [1, 2, 63, 64, 65, 511, 512, 513, 4096, 4097, 16_384, 16_385, 2**20 + 1]


@pytest.mark.parametrize("kernel", SCHEDULES)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_tiles_cover_both_head_dims(dtype, kernel):
    served = [D for D in HEAD_DIMS if SCHEDULES[kernel][-1].width >= D]
    for K in served:
        for V in served:
            tiling = Tiling.of(kernel, dtype, K, V)
            for first, second in ((tiling.k0, tiling.k1), (tiling.v0, tiling.v1)):
                assert first >= 16 and first.bit_count() == 1
                assert second == 0 or (second >= 16 and second.bit_count() == 1)
            assert tiling.parts * (tiling.k0 + tiling.k1) >= K
            assert tiling.parts == 1 or (tiling.parts * tiling.k0 == K and tiling.groups == 1)
            width = tiling.v0 + tiling.v1
            assert (tiling.groups - 1) * width < V <= tiling.groups * width
            assert tiling.groups == 1 or tiling.v1 == 0


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_splits_cover_every_token_once(tokens, dtype):
    for K in (16, 40, 80, 256):
        tiling = Tiling.of("state", dtype, K, K)
        chunk, splits = tiling.split(tokens)
        assert chunk % tiling.block_tokens == 0
        assert (splits - 1) * chunk < tokens <= splits * chunk
        assert splits <= max(16, tokens / 1024 + 1)
        for rows in (1, 20, 2000):
            run, runs = tiling.run(rows, tokens)
            assert run % tiling.block_tokens == 0
            assert (runs - 1) * run < tokens <= runs * run


def test_sums_do_not_know_the_batch():
    assert list(inspect.signature(Tiling.split).parameters) == ["self", "tokens"]


def test_long_sums_are_split_and_short_ones_are_not():
    tiling = Tiling.of("state", torch.float16, 64, 64)
    assert tiling.split(256)[1] == 1
    assert tiling.split(16_384)[1] > 4
    # With 16 heads they reach all multiprocessors of a large GPU.
    for D in (40, 64, 80):
        for tokens in (16_384, 65_536):
            programs = 16 * Tiling.of("state", torch.float16, D, D).split(tokens)[1]
            assert programs >= (128 if D == 64 and tokens < 65_536 else 256)
    assert Tiling.of("state", torch.float16, 64, 64).acc_dtype == torch.float32
    assert Tiling.of("state", torch.float64, 64, 64).acc_dtype == torch.float64


@pytest.mark.parametrize(
    "case",
    select(["large", "middle", "vit"]),
    ids=lambda case: f"{case.shape}-{case.dtype}-{case.layout}",
)
def test_sums_take_little_memory(case):
    """At most 32 MiB beside o forward, 64 beside the gradients backward."""
    dtype, D, rows = getattr(torch, case.dtype), case.D, case.B * case.H

    def sums(kernel, size):
        splits = Tiling.of(kernel, dtype, D, D).split(case.N)[1]
        # A single one is the state itself.
        return rows * splits * size * 4 if splits > 1 else 0

    state = rows * (D * D + D) * 4
    assert sums("state", D * D + D) + state <= 2**25
    if Tiling.of("grad_query", dtype, D, D).wide:
        # One after the other.
        backward = max(sums("grad_state", D * D), sums("grad_feature", D))
    else:
        backward = sums("grad_query", D * D + D)
    assert backward + state <= 2**26


@pytest.mark.gpu
def test_one_compiled_kernel_serves_every_length():
    kernels = [
        state.state_kernel,
        output.output_kernel,
        grad_query.grad_query_kernel,
        grad_feature.grad_feature_kernel,
        grad_key.grad_key_kernel,
        short.short_kernel,
    ]

    def compiled():
        return sum(len(cache[0]) for x in kernels for cache in x.device_caches.values())

    for D in (40, 64, 80):
        # Long and short sequences, and one query: its stride from token to token is no one's.
        for N, M in ((1000, 1001), (100, 101), (1, 2)):
            run(MEAN, *make_qkv((2, 2, N, M, D, D), torch.float16))
        once = compiled()
        for N, M in ((1024, 512), (8192, 77), (16384, 4096), (4097, 16384), (256, 3)):
            run(MEAN, *make_qkv((2, 2, N, M, D, D), torch.float16))
        assert compiled() == once


def test_float64_on_a_gpu_needs_triton_3_5(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("triton.__version__", "3.4.0")
    with pytest.raises(NotImplementedError, match=r"Triton 3\.5 or newer, got Triton 3\.4\.0"):
        require_float64_products()
    monkeypatch.setattr("triton.__version__", "3.10.0")
    require_float64_products()
