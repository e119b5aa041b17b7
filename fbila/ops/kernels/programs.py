"""Which tokens a program goes over.

Heads are fastest: where tokens hold their heads side by side, programs that run at one time share
the lines that a head's few bytes begin and end in.

Packed sequences have no batch axis. Sequence s takes the slots from `cu[s] // chunk + s` on, of
`chunk` tokens each: enough for any length, and known without a look at the others. `T // chunk + S`
slots serve S sequences of T tokens; some stay empty.
"""

import triton
import triton.language as tl


@triton.jit
def locate(cu, H, N, chunk, splits, GRAIN: tl.constexpr):
    """(batch, head, batch of the state, first token, end, row of the partial sums).

    `splits` programs share a head's tokens; with `cu` it is the number of sequences, which the
    states are of. GRAIN divides N, and more than 1 makes that plain to the compiler: where tokens
    are contiguous, 16 bytes are several of them, which must be there or not together.
    """
    i = tl.program_id(0).to(tl.int64)
    i_h = i % H
    if cu is None:
        i_b, i_s = i // H // splits, i // H % splits
        if GRAIN > 1:
            # A chunk is a number of blocks, which are 16 tokens at least.
            chunk = chunk // 16 * 16
        start = i_s.to(tl.int32) * chunk
        end = tl.minimum(start + chunk, N) // GRAIN * GRAIN
        return i_b, i_h, i_b, start, end, (i_b * H + i_h) * splits + i_s
    else:
        slot = (i // H).to(tl.int32)
        # The last sequence whose first slot is not beyond this one.
        i_x = slot * 0 - 1
        for i in range(0, splits, 256):
            o_x = i + tl.arange(0, 256)
            there = o_x < splits
            first = bound(cu, tl.where(there, o_x, 0), N) // chunk + o_x
            i_x += tl.sum((there & (first <= slot)).to(tl.int32), 0)
        begin = bound(cu, i_x, N)
        start = begin + (slot - begin // chunk - i_x) * chunk
        end = tl.minimum(start + chunk, bound(cu, i_x + 1, N))
        return i * 0, i_h, i_x.to(tl.int64), start, end, slot.to(tl.int64) * H + i_h


@triton.jit
def bound(cu, i, N):
    """cu[i], never outside the tokens whatever it holds."""
    return tl.minimum(tl.maximum(tl.load(cu + i).to(tl.int32), 0), N)
