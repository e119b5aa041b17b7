"""One call for every kernel and option, small enough for a sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/ops/every_kernel.py

Head dims may be named, `... every_kernel.py 40 160`: several processes take less time.
"""

import itertools
import sys

import torch

import fbila
from fbila.ops.centred_library import centred_la

TOKENS = 300


def calls(K: int, V: int, dtype: torch.dtype):
    """(name, function of q, k, v) of calls with head dims K and V."""
    angles = torch.rand(TOKENS, K // 2, device="cuda")
    weight = torch.rand(2, 2, TOKENS, device="cuda", requires_grad=True)
    mask = torch.rand(2, TOKENS, device="cuda") < 0.7
    scale = torch.randn(2, K, device="cuda", requires_grad=True)
    positions = torch.randn(2, TOKENS, K, device="cuda", requires_grad=True)
    ends = torch.tensor([0, 0, 17, 18, 400, 2 * TOKENS], device="cuda", dtype=torch.int32)

    def attend(**options):
        return lambda q, k, v: fbila.linear_attn(q, k, v, feature_map="elu1", **options)

    def packed(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return fbila.linear_attn(q, k, v, feature_map="elu1", cu_seqlens=ends)

    def halves(q, k, v):
        state = fbila.linear_attn_state(k, v, feature_map="elu1", key_mask=mask)
        return fbila.linear_attn_apply(q, state + state, feature_map="elu1")

    yield "plain", attend()
    yield "short", lambda q, k, v: attend()(q[:, :, :70], k[:, :, :100], v[:, :, :100])
    if K <= 128:
        yield "signed", lambda q, k, v: fbila.linear_attn(q, k, v, feature_map="signed")
    yield (
        "centred",
        lambda q, k, v: torch.cat([x.flatten() for x in centred_la(q, k, v, "relu", 0.01)]),
    )
    yield "simple", lambda q, k, v: fbila.simple_la(q, k, v, feature_map="relu", scale=0.01)
    for interleaved in (True, False):
        rotary = fbila.Rotary(angles.cos(), angles.sin(), interleaved)
        yield f"rotary {interleaved}", attend(rotary=rotary)
    yield "weight and mask", attend(key_weight=weight, key_mask=mask)
    yield "grouped", lambda q, k, v: attend()(q, k[:, :1], v[:, :1])
    yield "packed", packed
    yield "state and apply", halves
    yield "focused", lambda q, k, v: fbila.focused_la(q, k, v, scale=scale, key_mask=mask)
    yield "positions", lambda q, k, v: fbila.focused_la(q, k, v, key_positions=positions.to(k))


HEAD_DIMS = {40: 40, 64: 64, 80: 80, 160: 130}


def main(head_dims: list[int]) -> None:
    for K, dtype in itertools.product(head_dims, (torch.bfloat16, torch.float32)):
        V = HEAD_DIMS[K]
        for name, function in calls(K, V, dtype):
            q, k, v = (
                torch.randn(2, TOKENS, 2, width, device="cuda", dtype=dtype)
                .transpose(1, 2)
                .requires_grad_()
                for width in (K, K, V)
            )
            # The second time goes the short way.
            for _ in range(2):
                o = function(q, k, v)
                gradients = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
            assert all(x.isfinite().all() for x in (o, *gradients)), name
            print(K, V, dtype, name, flush=True)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1:]] or list(HEAD_DIMS))
