"""Sums of weights and biases added up, which programs have made part by part.

sums `(groups * parts, TAPS + 1, C)` -> dtaps `(sets, TAPS)` and dbias `(sets,)`, either of which
may be None: over the parts of a group and over the C / sets heads that share a set. Where there are
more sets than channels, each group has C of its own. They are added up in one order every time.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch, kernel

# Sums of a program, and of how many parts it reads them at a time.
COLUMNS, AT_A_TIME = 32, 128


@kernel
def add_up_kernel(
    sums, dtaps, dbias,
    channels: "i32", sets: "i32", repeats: "i32", parts: "i32",
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, AT_A_TIME: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_t, o_r = tl.program_id(1), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_r = o_r < sets
    # A sample's own taps have parts of their own.
    i_g, o_c = (o_r // channels).to(tl.int64), o_r % channels
    # Added up at the end: in between nothing waits for the other threads.
    total = tl.zeros((AT_A_TIME, COLUMNS), dtype=ACC)
    # Every head of every part.
    for first in range(0, parts * repeats, AT_A_TIME):
        o_h = first + tl.arange(0, AT_A_TIME)
        o_p, head = o_h // repeats, o_h % repeats
        o_s = ((i_g * parts)[None, :] + o_p[:, None]) * ((TAPS + 1) * channels)
        o_s += i_t * channels + (head * sets)[:, None] + o_c[None, :]
        m_s = (o_p < parts)[:, None] & m_r[None, :]
        total += tl.load(sums + o_s, mask=m_s, other=0.0)
    total = tl.sum(total, 0)
    if i_t < TAPS:
        if dtaps is not None:
            tl.store(dtaps + o_r.to(tl.int64) * TAPS + i_t, total.to(dtaps.dtype.element_ty), m_r)
    elif dbias is not None:
        tl.store(dbias + o_r, total.to(dbias.dtype.element_ty), mask=m_r)


@lru_cache(maxsize=1024)
def plan_add_up(
    channels: int,
    sets: int,
    parts: int,
    taps: int,
    acc: Any,
    others: tuple[torch.dtype | None, ...],
) -> Launch:
    """For `parts` of each group.

    acc: The dtype of the sums, as Triton has it.
    others: dtypes of dtaps and dbias, which the kernel is compiled for as well.
    """
    return Launch(
        add_up_kernel,
        (triton.cdiv(sets, COLUMNS), taps + 1),
        (channels, sets, max(1, channels // sets), parts),
        {"TAPS": taps, "COLUMNS": COLUMNS, "AT_A_TIME": AT_A_TIME, "ACC": acc},
        {"num_warps": 4, "num_stages": 1},
    )
