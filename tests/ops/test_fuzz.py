"""Random shapes, dtypes, layouts and options are all within the budget.

FBILA_FUZZ_EXAMPLES sets how many are tried, the same ones every time; FBILA_FUZZ_FIRST is the first
seed of the cases with every option, so that several processes can share them.
"""

import os
from itertools import accumulate, pairwise

import pytest
import torch
from helpers import (
    ALL_VARIANTS,
    CUDA,
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    make_qkv,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fbila
from fbila.ops.feature_maps import feature_dim

from .random_cases import Case, Tensors, make_tensors, random_case
from .rounding import Rounded, focused_attention, joined, linear_attention

EXAMPLES = int(os.environ.get("FBILA_FUZZ_EXAMPLES", "20" if CUDA else "40"))
# A GPU compiles each head dim anew and does not mind the tokens; the interpreter is the reverse.
HEAD_DIMS = st.sampled_from([5, 64]) if CUDA else st.integers(1, 70)
TOKENS = st.integers(1, 3000) if CUDA else st.integers(1, 70)
ROWS = st.integers(1, 3) if CUDA else st.integers(1, 2)

shapes = st.tuples(ROWS, ROWS, TOKENS, TOKENS, HEAD_DIMS, HEAD_DIMS)
layouts = st.lists(st.sampled_from([None, *LAYOUTS]), min_size=4, max_size=4)


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(ALL_VARIANTS), layouts, st.integers(0, 99))
def test_anything(shape, dtype, variant, layouts, seed):
    tensors = make_qkv(shape, dtype, variant=variant, seed=seed)
    assert_accurate(*tensors, variant)
    views = [LAYOUTS[name](x) if name else x for name, x in zip(layouts, tensors, strict=True)]
    if CUDA and "token_contiguous" in layouts:
        # There a GPU may add in another order.
        assert_accurate(*views, variant)
    else:
        assert_same_bits(run(variant, *views), run(variant, *tensors))


# Every option of every function.

SEEDS = range(int(os.environ.get("FBILA_FUZZ_FIRST", "0")), 10**9)[
    : int(os.environ.get("FBILA_FUZZ_EXAMPLES", "48" if CUDA else "24"))
]
# The largest error allowed, in standard deviations of honest rounding.
SIGMAS = 6
INF, TINY = float("inf"), torch.finfo(torch.float32).smallest_normal


def some_tokens(x: torch.Tensor | fbila.Rotary | None, axis: int, tokens: slice):
    """Those of `x` along `axis`, counted from the end; of tables, where there are any."""
    if x is None:
        return None
    if isinstance(x, fbila.Rotary):
        cos, sin = (some_tokens(table, axis, tokens) for table in (x.cos, x.sin))
        return x._replace(cos=cos, sin=sin)
    return x[(..., tokens, *[slice(None)] * (-axis - 1))]


def results(case: Case, x: Tensors, impl: str, *, wide: bool) -> dict[str, torch.Tensor]:
    """o and the gradients that are wanted; `wide`: in float64."""
    leaves = {"q": x.q, "k": x.k, "v": x.v, "weight": x.weight, "scale": x.scale}
    wanted = case.options.wanted
    leaves = {
        name: (t.double() if wide else t).detach().requires_grad_(name in wanted)
        for name, t in leaves.items()
        if t is not None
    }
    o = call(case, x, impl, **leaves)
    gradients = torch.autograd.grad(o, [leaves[name] for name in wanted], x.do.to(o.dtype))
    for name, gradient in zip(wanted, gradients, strict=True):
        assert gradient.dtype == leaves[name].dtype
    named = {"d" + name: gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return {"o": o.detach(), **named}


def call(case: Case, x: Tensors, impl: str, q, k, v, weight=None, scale=None) -> torch.Tensor:
    """The function of the case; packed tensors go in and come out as a batch of one."""
    options, mask = case.options, x.mask
    normalized = {"normalizer": options.normalizer, "eps": options.eps}
    if options.function == "focused_la":
        focusing = {"focusing_factor": options.power, "scale": scale, "eps": options.eps}
        return fbila.focused_la(q, k, v, key_mask=mask, impl=impl, **focusing)
    both = {"feature_map": options.feature_map, "impl": impl}
    if options.function == "halves":
        states = [
            fbila.linear_attn_state(
                some_tokens(k, -2, keys),
                some_tokens(v, -2, keys),
                rotary=some_tokens(x.of_k, -2, keys),
                key_weight=some_tokens(weight, -1, keys),
                key_mask=some_tokens(mask, -1, keys),
                **both,
            )
            for keys in (slice(0, case.cut), slice(case.cut, None))
        ]
        state = states[0] + states[1] if case.cut else states[1]
        return fbila.linear_attn_apply(q, state, rotary=x.of_q, **both, **normalized)
    packed = {}
    if case.lengths is not None:
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        weight, mask = (None if t is None else t[0] for t in (weight, mask))
        ends = torch.tensor([0, *accumulate(case.lengths)], dtype=case.index_dtype, device=DEVICE)
        packed["cu_seqlens"] = ends
    both.update(rotary=x.of_q, key_weight=weight, key_mask=mask, **packed)
    if options.function == "simple_la":
        o = fbila.simple_la(q, k, v, scale=options.scale, **both)
    else:
        o = fbila.linear_attn(q, k, v, **both, **normalized)
    return o.transpose(0, 1)[None] if packed else o


def bounded(case: Case, x: Tensors) -> dict[str, Rounded]:
    """All that `results` may name, with the variance of honest rounding."""
    options, (q, k, v, do, of_q, of_k, weight, mask, scale) = case.options, x
    if mask is not None:
        k, v = (t.masked_fill(~mask[:, None, :, None], 0) for t in (k, v))
    if options.function == "focused_la":
        how = {"eps": options.eps, "mask": mask}
        numbers = focused_attention(q, k, v, do, options.power, scale, **how)
        if scale is not None:
            numbers["dscale"] = numbers["dscale"].stored(scale.dtype)
    else:
        if weight is not None:
            weight = (weight if weight.dim() == 3 else weight[:, None]).expand(k.shape[:3])
            weight = weight if mask is None else weight.masked_fill(~mask[:, None], 0)
        how = {"normalizer": options.normalizer, "eps": options.eps}
        if options.function == "simple_la":
            features = feature_dim(options.K, options.feature_map)
            how["scale"] = features**-0.5 if options.scale is None else options.scale
        ends = [0, *accumulate(case.lengths or ())]
        sequences = [linear_attention(
            *(some_tokens(t, -2, tokens) for t in (q, k, v, do)), options.feature_map, **how,
            of_q=some_tokens(of_q, -2, tokens), of_k=some_tokens(of_k, -2, tokens),
            weight=some_tokens(weight, -1, tokens), mask=some_tokens(mask, -1, tokens),
        ) for tokens in ([slice(*pair) for pair in pairwise(ends)] or [slice(None)])]  # fmt: skip
        numbers = {
            name: joined([numbers[name] for numbers in sequences], lambda t: torch.cat(t, 2))
            for name in sequences[0]
        }
        if weight is not None:
            dw = numbers.pop("dw")
            if options.weight == "shared":
                dw = dw.sum(1).moved(lambda t: t[:, 0])
            numbers["dweight"] = dw.stored(options.weight_dtype)
    return numbers | {name: numbers[name].stored(q.dtype) for name in ("o", "dq", "dk", "dv")}


def worst(case: Case) -> dict[str, float]:
    """The largest error of each result of the kernels, as a share of what is allowed."""
    x = make_tensors(case)
    truth, bounds = results(case, x, "reference", wide=True), bounded(case, x)
    actual = results(case, x, "triton", wide=False)
    # In float64 the truth is rounded too.
    sigmas = 2 * SIGMAS if case.options.dtype == torch.float64 else SIGMAS
    shares = {}
    for name, expected in truth.items():
        value, bound = bounds[name].value, sigmas * bounds[name].variance.sqrt() + TINY
        assert actual[name].shape == expected.shape == bound.shape, name
        assert ((value - expected).abs() <= bound).all(), f"{name}: the bound is of other numbers"
        error = (actual[name].double() - expected).abs()
        # What may be stored as inf may be so.
        overflow = expected.abs() + bound > torch.finfo(actual[name].dtype).max
        share = (error / bound).masked_fill(overflow & ~error.isnan(), 0).amax()
        shares[name] = INF if share.isnan() else float(share)
    return shares


@pytest.mark.parametrize("seed", SEEDS)
def test_every_option(seed):
    case = random_case(seed)
    shares = worst(case)
    assert max(shares.values()) <= 1, f"{case}: errors as shares of the bound {shares}"
