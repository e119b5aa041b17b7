"""Block sizes and splits: pure functions of shape and dtype, so results never depend on timing."""

import os
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# The kernels that sum a state over tokens.
SUMS = ("state", "grad_state", "grad_query")
# The largest sum of outer products that one program keeps in registers, by bytes of an element.
LARGEST_STATE = {2: 256 * 128, 4: 64 * 64, 8: 32 * 32}
# The largest state that a program reads at once, which it keeps in shared memory.
LARGEST_OPERAND = {2: 256 * 256, 4: 64 * 64, 8: 32 * 32}


class Schedule(NamedTuple):
    """For heads up to `width` wide: tokens of a block, warps, pipeline stages, and the tokens that
    a program goes over in all (where there are fewer, see `Tiling.split` and `Tiling.run`)."""

    width: int
    block_tokens: int
    num_warps: int
    num_stages: int
    span: int


# 16-bit types. The fastest of those measured on an H200. Heads that are `wide` do not reach the
# last rows of grad_query and grad_key.
SCHEDULES = {
    "state": (
        Schedule(32, 64, 2, 3, 2048),
        Schedule(48, 32, 4, 3, 8192),
        Schedule(64, 32, 2, 4, 2048),
        Schedule(80, 32, 2, 3, 4096),
        Schedule(112, 32, 4, 4, 5504),
        Schedule(128, 32, 4, 4, 3072),
        Schedule(160, 64, 8, 3, 8192),
        Schedule(256, 32, 8, 4, 16384),
    ),
    "grad_state": (
        Schedule(80, 32, 2, 3, 4096),
        Schedule(128, 32, 4, 4, 3072),
        Schedule(160, 64, 8, 3, 8192),
        Schedule(256, 32, 8, 3, 16384),
    ),
    "output": (
        Schedule(32, 128, 8, 4, 512),
        Schedule(64, 64, 4, 4, 256),
        Schedule(80, 64, 4, 3, 256),
        Schedule(128, 64, 4, 4, 2048),
        Schedule(160, 64, 4, 3, 2048),
        Schedule(256, 128, 8, 1, 4096),
    ),
    "grad_query": (
        Schedule(32, 64, 4, 4, 2048),
        Schedule(48, 32, 2, 3, 1024),
        Schedule(80, 64, 4, 4, 4096),
        Schedule(256, 32, 8, 3, 2048),
    ),
    "grad_feature": (
        Schedule(80, 32, 2, 3, 1024),
        Schedule(128, 64, 4, 2, 1024),
        Schedule(160, 32, 4, 3, 2048),
        Schedule(256, 32, 8, 3, 4096),
    ),
    "grad_feature_of_key": (
        Schedule(128, 64, 4, 2, 1024),
        Schedule(160, 64, 4, 2, 2048),
        Schedule(256, 128, 8, 1, 4096),
    ),
    "grad_key": (
        Schedule(32, 128, 8, 3, 256),
        Schedule(48, 128, 4, 2, 512),
        Schedule(64, 64, 4, 3, 256),
        Schedule(80, 64, 4, 3, 512),
        Schedule(256, 64, 4, 2, 2048),
    ),
    "short": (Schedule(64, 64, 4, 3, 256),),
}
# With rotary, where others are faster or the only ones to fit: the tables take registers and shared
# memory.
ROTARY_SCHEDULES = {
    "state": (Schedule(32, 128, 4, 3, 2048),),
    "output": (
        Schedule(32, 64, 4, 4, 512),
        Schedule(160, 64, 4, 3, 1024),
        Schedule(256, 128, 8, 1, 1024),
    ),
    "grad_feature": (*SCHEDULES["grad_feature"][:-1], Schedule(256, 32, 8, 2, 4096)),
    "grad_query": (Schedule(32, 32, 2, 3, 2048), Schedule(64, 64, 4, 3, 4096)),
    "grad_key": (Schedule(32, 128, 4, 3, 256),),
}
# The feature maps whose values are the inputs' own, which 16 bits hold exactly.
EXACT_MAPS = ("none", "relu")
# Up to this head dim a second product beside such features costs next to nothing.
WIDEST_HALVES = 32
# float32 and float64 are not tuned. With 32 tokens the ptxas of Triton 3.6 crashes on one of the
# float64 kernels.
UNTUNED = {4: Schedule(256, 32, 4, 2, 2048), 8: Schedule(256, 16, 4, 1, 2048)}
# Programs that keep a large GPU busy: a few for each of its hundred-odd multiprocessors, which run
# at one time. Where there is more to do, twice as many: the last ones to end are fewer of all.
ENOUGH_PROGRAMS = 512


@dataclass(frozen=True)
class Tiling:
    """How one kernel cuts (dtype, K, V): K into tiles k0 + k1, V into `groups` of v0 + v1.

    The second tile of K begins at channel kb. Sums too large for one program are made by `parts`
    of K or by the groups of V. With `halves` S is two 16-bit operands, not one: where features are
    exact, its rounding would be the largest error before that of the result.
    """

    block_tokens: int
    k0: int
    k1: int
    kb: int
    v0: int
    v1: int
    groups: int
    parts: int
    num_warps: int
    num_stages: int
    span: int
    fewest: tuple[int, int, bool]
    usual: int
    sums: bool
    halves: bool
    itemsize: int
    acc_dtype: torch.dtype
    precision: str

    @staticmethod
    @cache
    def of(
        kernel: str,
        dtype: torch.dtype,
        K: int,
        V: int,
        rotary: str = "none",
        feature_map: str = "none",
    ) -> "Tiling":
        """For K features, which "signed" makes of half as many channels."""
        if dtype == torch.float64:
            require_float64_products()
        paired = rotary == "halves" or feature_map == "signed"
        if paired:
            # A rotation of the one half of a head dim against the other, or two features of a
            # channel: a tile each.
            k0 = k1 = max(16, triton.next_power_of_2(K // 2))
            kb = K // 2
        else:
            k0, k1 = head_dim_cover(K, kernel)
            kb = k0
        v0, v1 = head_dim_cover(V, kernel)
        if kernel in ("state", "grad_state") and k0 == 128 and 0 < k1 < 64 and not paired:
            # Warp-group products have 64 rows at least.
            k1 = 64
        sums = kernel in SUMS
        largest = (LARGEST_STATE if sums else LARGEST_OPERAND)[dtype.itemsize]
        parts = 1
        if kernel in ("state", "grad_state") and rotary == "none":
            parts = parts_of(K, v0 + v1, largest, feature_map)
        if parts > 1:
            k0, k1, kb = K // parts, 0, K // parts
        elif (k0 + k1) * (v0 + v1) > largest:
            v0, v1 = max(16, 2 ** ((largest // (k0 + k1)).bit_length() - 1)), 0
        schedules = SCHEDULES[kernel]
        if rotary != "none":
            schedules = ROTARY_SCHEDULES.get(kernel, ()) + schedules
        schedule = UNTUNED.get(dtype.itemsize) or next(s for s in schedules if max(K, V) <= s.width)
        # One even where there are no values: z is summed with the first.
        groups = max(1, triton.cdiv(V, v0 + v1))
        stages = schedule.num_stages
        if kernel.startswith("grad_feature") and groups > 1:
            # S is loaded in turn there: pipelined, it would fill the shared memory.
            stages = 1
        return Tiling(
            block_tokens=schedule.block_tokens,
            k0=k0,
            k1=k1,
            kb=kb,
            v0=v0,
            v1=v1,
            groups=groups,
            parts=parts,
            num_warps=schedule.num_warps,
            num_stages=stages,
            span=schedule.span,
            fewest=few_programs(kernel, max(K, V)),
            usual=usual_programs(kernel, max(K, V)),
            sums=sums,
            halves=(
                dtype.itemsize == 2
                and feature_map in EXACT_MAPS
                and rotary == "none"
                and max(K, V) <= WIDEST_HALVES
            ),
            itemsize=dtype.itemsize,
            acc_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            # float32 means float32: tf32 would keep 10 bits of 23.
            precision="ieee",
        )

    @property
    def cover(self) -> dict[str, int]:
        return {"K0": self.k0, "K1": self.k1, "KB": self.kb, "V0": self.v0, "V1": self.v1}

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def wide(self) -> bool:
        """Whether the gradients of this head take more registers than one program has.

        That of the query sums a state on the way, that of the key does not.
        """
        most = 128 * 128
        if self.acc_dtype == torch.float64:
            most = 32 * 32
        elif self.sums and (self.k1 > 0 or self.v1 > 0 or self.itemsize > 2):
            most = 64 * 64
        return self.groups > 1 or (self.k0 + self.k1) * (self.v0 + self.v1) > most

    @property
    def uniform(self) -> bool:
        """Whether V is cut as K is, so that their tiles can share offsets."""
        return self.groups == 1 and (self.k0, self.k1, self.kb) == (self.v0, self.v1, self.v0)

    @staticmethod
    def acc(dtype: torch.dtype) -> tl.dtype:
        """The Triton type that sums of `dtype` are kept in."""
        return tl.float64 if dtype == torch.float64 else tl.float32

    def split(self, tokens: int) -> tuple[int, int]:
        """(tokens a program sums, number of programs) for a sum over `tokens`.

        Programs of `span` tokens, but where that would be fewer, up to `usual` of a thousand
        tokens and more, or up to `most` of about `least`, and up to twice as many of half as many
        where `twice` allows it: writing the partial sums must stay small beside reading the
        tokens. B and H must not enter: see `kernels.state`.
        """
        most, least, twice = self.fewest
        if twice and tokens <= most * least:
            most, least = 2 * most, least // 2
        splits = min(most, max(1, (tokens + least // 2) // least))
        if twice and splits == 2:
            # Two halves of a few hundred tokens write nearly as much as they read.
            splits = 1
        splits = max(splits, min(self.usual, tokens // 1024), triton.cdiv(tokens, self.span))
        chunk = triton.cdiv(triton.cdiv(tokens, splits), self.block_tokens) * self.block_tokens
        return chunk, triton.cdiv(tokens, chunk)

    def run(self, rows: int, tokens: int) -> tuple[int, int]:
        """(tokens a program maps, programs a row) where every token's result is its own.

        Longer runs load the state less often; they stop where programs would become few.
        """
        blocks = triton.cdiv(tokens, self.block_tokens)
        in_turn = 2 if rows * blocks > 8 * ENOUGH_PROGRAMS else 1
        programs = in_turn * ENOUGH_PROGRAMS
        run = max(1, min(self.span // self.block_tokens, rows * blocks // programs))
        return run * self.block_tokens, triton.cdiv(blocks, run)


def head_dim_cover(D: int, kernel: str) -> tuple[int, int]:
    """One or two powers of two, at least 16 and at most 128, that cover `D` with little to spare.

    Up to 64 one tile is faster whatever it wastes, but for the kernel that is short of registers.

    >>> [head_dim_cover(D, "output") for D in (40, 64, 80, 112, 160)]
    [(64, 0), (64, 0), (64, 16), (128, 0), (128, 32)]
    """
    whole = max(16, triton.next_power_of_2(D))
    first = min(128, whole // 2)
    rest = max(16, triton.next_power_of_2(D - first))
    one = whole <= (32 if kernel == "grad_query" else 64) or (
        whole <= 128 and first + rest >= whole
    )
    return (whole, 0) if one else (first, rest)


def parts_of(K: int, width: int, largest: int, feature_map: str) -> int:
    """Into how many parts K is cut where a (K, width) sum is too large for one program.

    Each computes its own features alone, where groups of V would all compute all of them. Not for
    maps whose features of a token hang together, and only into powers of two.
    """
    parts = 1
    while K * width > parts * largest:
        parts *= 2
    part = K // parts
    fits = K % parts == 0 and part >= 16 and part & (part - 1) == 0 and part <= 128
    return parts if fits and feature_map not in ("signed", "focused") else 1


def few_programs(kernel: str, width: int) -> tuple[int, int, bool]:
    """(most, least, twice) of `Tiling.split`: the wider the head, the more its sums take."""
    if width > 160:
        return 4, 1024, False
    return 8, 512, kernel == "state" and width <= 64


def usual_programs(kernel: str, width: int) -> int:
    """Programs of `Tiling.split` over many tokens, for the 16 heads of a UNet's two pictures.

    Eight of each, as other heads have, would not reach all multiprocessors once.
    """
    if kernel != "state":
        return 1
    return 32 if 32 < width <= 48 else 16 if 64 < width <= 80 else 1


def require_float64_products() -> None:
    """Triton multiplies float64 tiles on a GPU since 3.5; its interpreter always did."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        raise NotImplementedError(
            f"float64 on a GPU needs Triton 3.5 or newer, got Triton {triton.__version__}. Pass "
            "impl='reference' to use PyTorch."
        )
