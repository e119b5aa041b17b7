"""A feature map that is fused into the kernels equals the map applied first."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    Variant,
    assert_accurate,
    assert_derivatives,
    assert_equations,
    assert_in_budget,
    assert_same_bits,
    eager,
    make_qkv,
    run,
    term_sizes,
)

MAPS = {"elu1": lambda x: F.elu(x) + 1, "relu": F.relu}
IMPLEMENTATIONS = ["reference", "triton"]  # of the maps that the kernels do not fuse

each_map = pytest.mark.parametrize("feature_map", MAPS)
each_normalizer = pytest.mark.parametrize("normalizer", ["mean", "sum", None])


@each_map
@each_normalizer
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_fused_equals_applied_first(normalizer, feature_map, dtype):
    fused = Variant(normalizer, feature_map)
    q, k, v, do = make_qkv((1, 2, 40, 70, 17, 8), dtype, variant=fused)
    phi = MAPS[feature_map]
    actual = run(fused, q, k, v, do)
    applied = run(lambda q, k, v: Variant(normalizer)(phi(q), phi(k), v), q, k, v, do)
    wide = [x.double() for x in (q, k, v, do)]
    truth = run(lambda *x: eager(*x, fused), *wide)
    sizes = term_sizes(q, k, v, do, fused)
    for i, name in enumerate(["o", "dq", "dk", "dv"]):
        assert_in_budget(actual[i], applied[i], truth[i], sizes[i], backward=i > 0, name=name)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_fused_relu_is_exact(dtype):
    q, k, v, do = make_qkv((1, 2, 40, 70, 17, 8), dtype)
    applied = run(lambda q, k, v: Variant("mean")(q.relu(), k.relu(), v), q, k, v, do)
    # On a GPU they are two kernels, and the compiler need not order their sums alike.
    assert_same_bits(run(Variant("mean", "relu"), q, k, v, do), applied, reordered=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalizer", ["mean", None])
def test_elu1_keeps_the_digits_of_very_negative_inputs(normalizer, dtype):
    # exp(x) - 1 + 1 would be 0 below -17 in float32 and below -8 in float16.
    q, k, v, _ = make_qkv((1, 1, 20, 30, 16, 8), dtype)
    q, k = q - 8, k - 5
    elu1 = Variant(normalizer, "elu1", eps=0.0)
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (q.double(), k.double()))
    truth = eager(phi_q, phi_k, v.double(), Variant(normalizer, eps=0.0))
    assert_in_budget(elu1(q, k, v), elu1(q, k, v, impl="reference"), truth, truth, backward=False)


@each_map
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_inputs_do_not_overflow_the_exponential(feature_map, dtype):
    variant = Variant("mean", feature_map)
    q, k, v, do = make_qkv((1, 1, 20, 30, 16, 8), dtype)
    assert_accurate(q * 100, k * 100, v, do, variant)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("variant", [Variant("mean", "relu"), Variant(None, "elu1")])
def test_gradient_at_zero_is_that_of_the_reference(variant, dtype):
    q, k, v, do = make_qkv((1, 1, 20, 30, 16, 8), dtype)
    q[..., ::3] = 0
    k[..., ::2] = 0
    assert_accurate(q, k, v, do, variant)
    if variant.feature_map == "relu":
        dq, dk = run(variant, q, k, v, do)[1:3]
        assert not dq[..., ::3].any() and not dk[..., ::2].any()


each_new_map = pytest.mark.parametrize(
    "feature_map, phi",
    [
        ("relu_offset", lambda x: x.clamp(min=0) + 1e-6),
        ("exp", torch.exp),
        ("signed", lambda x: torch.cat((x.clamp(min=0), (-x).clamp(min=0)), -1)),
    ],
)
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@each_impl
@each_new_map
@each_normalizer
def test_is_the_map_applied_first(normalizer, feature_map, phi, impl):
    q, k, v, _ = make_qkv((1, 2, 20, 30, 8, 8), torch.float64)
    fused, bare = Variant(normalizer, feature_map), Variant(normalizer)
    o = fused(q, k, v, impl=impl)
    assert_equations(o, bare(phi(q), phi(k), v, impl="reference"))


@each_impl
@each_new_map
@each_normalizer
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_is_accurate(dtype, normalizer, feature_map, phi, impl):
    variant = Variant(normalizer, feature_map, eps=1e-4)
    assert_accurate(*make_qkv((1, 2, 40, 70, 17, 8), dtype), variant, impl=impl)


@each_impl
@each_new_map
@each_normalizer
def test_gradcheck(normalizer, feature_map, phi, impl):
    q, k, v, _ = make_qkv((1, 1, 4, 5, 3, 2), torch.float64, away_from_zero=True)
    variant = Variant(normalizer, feature_map)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert_derivatives(variant, leaves, impl)


@each_impl
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_relu_offset_has_no_denominator_of_zero(dtype, impl):
    q, k, v, do = make_qkv((1, 1, 20, 30, 16, 8), dtype)
    variant = Variant("mean", "relu_offset", eps=0.0)
    o, *gradients = run(lambda *x: variant(*x, impl=impl), -q.abs(), -k.abs(), v, do)
    # All features are 1e-6, and every query gets the mean of the values.
    mean = v.double().mean(2, keepdim=True)
    assert (o - mean).abs().max() <= 8 * torch.finfo(dtype).eps * v.abs().max()
    assert all(x.isfinite().all() for x in gradients)


@each_impl
def test_relu_offset_has_the_gradient_of_relu_at_zero(impl):
    q, k, v, do = make_qkv((1, 1, 20, 30, 16, 8), torch.float64)
    q[..., ::3], k[..., ::2] = 0, 0
    _, dq, dk, _ = run(lambda *x: Variant("mean", "relu_offset")(*x, impl=impl), q, k, v, do)
    assert not dq[..., ::3].any() and not dk[..., ::2].any()
