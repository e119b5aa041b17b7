"""Block sizes and splits: pure functions of shape and dtype, so results never depend on timing."""

import os
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

# The largest sum of outer products that one program keeps in registers, by bytes of an element.
LARGEST_STATE = {2: 160 * 160, 4: 64 * 64, 8: 32 * 32}
# 16-bit types: (tokens of a block, warps, pipeline stages) by kernel, for heads up to 64 and up to
# 128 wide. The fastest of those measured on an H200.
SCHEDULES = {
    "state": {64: (32, 4, 3), 128: (32, 8, 3)},
    "output": {64: (64, 4, 3), 128: (64, 4, 1)},
    "grad_query": {64: (32, 4, 3), 128: (32, 8, 3)},
    "grad_key": {64: (64, 4, 3), 128: (64, 4, 2)},
}
# Programs that keep a large GPU busy: a few for each of its hundred-odd multiprocessors.
ENOUGH_PROGRAMS = 1024


@dataclass(frozen=True)
class Tiling:
    """How one kernel cuts (dtype, K, V): K into tiles k0 + k1, V into `groups` of v0 + v1."""

    block_tokens: int
    k0: int
    k1: int
    v0: int
    v1: int
    groups: int
    num_warps: int
    num_stages: int
    acc_dtype: torch.dtype
    precision: str

    @staticmethod
    @cache
    def of(kernel: str, dtype: torch.dtype, K: int, V: int) -> "Tiling":
        if dtype == torch.float64:
            require_float64_products()
        k0, k1 = head_dim_cover(K)
        v0, v1 = head_dim_cover(V)
        largest = LARGEST_STATE[dtype.itemsize]
        if (k0 + k1) * (v0 + v1) > largest:
            v0, v1 = max(16, 2 ** ((largest // (k0 + k1)).bit_length() - 1)), 0
        # With 32 tokens the ptxas of Triton 3.6 crashes on one of the float64 kernels.
        tokens, warps, stages = (16 if dtype.itemsize == 8 else 32), 4, 1
        if dtype.itemsize == 2:
            tokens, warps, stages = SCHEDULES[kernel][64 if max(K, V) <= 64 else 128]
        return Tiling(
            block_tokens=tokens,
            k0=k0,
            k1=k1,
            v0=v0,
            v1=v1,
            groups=triton.cdiv(V, v0 + v1),
            num_warps=warps,
            num_stages=stages,
            acc_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            # float32 means float32: tf32 would keep 10 bits of 23.
            precision="ieee",
        )

    @property
    def cover(self) -> dict[str, int]:
        return {"K0": self.k0, "K1": self.k1, "V0": self.v0, "V1": self.v1}

    @staticmethod
    def acc(dtype: torch.dtype) -> tl.dtype:
        """The Triton type that sums of `dtype` are kept in."""
        return tl.float64 if dtype == torch.float64 else tl.float32

    def split(self, tokens: int) -> tuple[int, int]:
        """(tokens a program sums, number of programs) for a sum over `tokens`.

        At least 512 tokens each, so that writing the partial sums stays small beside reading the
        tokens; 2048 once there are eight programs, up to 32 of them (8 where a head's state is cut
        into tiles, whose partial sums are large). B and H must not enter: see `kernels.state`.
        """
        most = 32 if self.groups == 1 else 8
        splits = min(most, max(min(8, triton.cdiv(tokens, 512)), triton.cdiv(tokens, 2048)))
        chunk = triton.cdiv(triton.cdiv(tokens, splits), self.block_tokens) * self.block_tokens
        return chunk, triton.cdiv(tokens, chunk)

    def run(self, rows: int, tokens: int) -> tuple[int, int]:
        """(tokens a program maps, programs a row) where every token's result is its own.

        Longer runs load the state less often; they stop where programs would become few.
        """
        blocks = triton.cdiv(tokens, self.block_tokens)
        run = max(1, min(8, rows * blocks // ENOUGH_PROGRAMS))
        return run * self.block_tokens, triton.cdiv(blocks, run)


def head_dim_cover(D: int) -> tuple[int, int]:
    """One or two powers of two, at least 16 and at most 128, that cover `D` with little to spare.

    >>> head_dim_cover(64), head_dim_cover(40), head_dim_cover(112), head_dim_cover(160)
    ((64, 0), (32, 16), (128, 0), (128, 32))
    """
    whole = max(16, triton.next_power_of_2(D))
    first = min(128, whole // 2)
    rest = max(16, triton.next_power_of_2(D - first))
    return (whole, 0) if whole <= 128 and first + rest >= whole else (first, rest)


def require_float64_products() -> None:
    """Triton multiplies float64 tiles on a GPU since 3.5; its interpreter always did."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        raise NotImplementedError(
            f"float64 on a GPU needs Triton 3.5 or newer, got Triton {triton.__version__}. Pass "
            "impl='reference' to use PyTorch."
        )
