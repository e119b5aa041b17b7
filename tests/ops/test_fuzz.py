"""Random shapes, dtypes, layouts and options are all within the budget.

FBILA_FUZZ_EXAMPLES sets how many are tried; the same ones every time.
"""

import os

from helpers import (
    ALL_VARIANTS,
    CUDA,
    DTYPES,
    LAYOUTS,
    assert_accurate,
    assert_same_bits,
    make_qkv,
    run,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FBILA_FUZZ_EXAMPLES", "20" if CUDA else "40"))
# A GPU compiles each head dim anew and does not mind the tokens; the interpreter is the reverse.
HEAD_DIMS = st.sampled_from([5, 64]) if CUDA else st.integers(1, 70)
TOKENS = st.integers(1, 3000) if CUDA else st.integers(1, 70)

shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), TOKENS, TOKENS, HEAD_DIMS, HEAD_DIMS)
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
