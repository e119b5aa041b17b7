"""What the tests share: devices and dtypes, inputs and layouts, eager PyTorch, and the one budget.

An error is always measured against float64 on the inputs as they were given, and is allowed to be
a small multiple of what plain PyTorch does at the same dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import fbila
from fbila.ops.autograd import ordinary

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

# Triton's interpreter computes bfloat16 dot products wrongly, so bfloat16 is for GPUs alone.
LOW = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
DTYPES = [torch.float32, *LOW]

# The feature maps as a user of PyTorch would write them.
MAPS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x * 1,
    "elu1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "relu_offset": lambda x: F.relu(x) + 1e-6,
    "exp": torch.exp,
    "signed": lambda x: torch.cat((x.relu(), (-x).relu()), -1),
}

# The one table: the largest max|error| / max|term| of forward and backward, whatever eager does.
RAILS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 5e-6),
    torch.float16: (1e-3, 3e-3),
    torch.bfloat16: (8e-3, 2e-2),
}


def zeros(*shape, dtype=torch.float32, device=DEVICE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def passes_made(monkeypatch, library) -> list[str]:
    """The names of the passes that kernels of `library` make from now on, on a CPU as well."""
    made: list[str] = []
    for name in ("in_kernel", "backward_in_kernel"):
        run = getattr(library, name)
        monkeypatch.setattr(
            library, name, lambda *t, run=run, name=name: made.append(name) or run(*t)
        )
    monkeypatch.setattr(library, "direct", ordinary)
    return made


class Variant(NamedTuple):
    """One operator with its options; normalizer None is simple_la."""

    normalizer: str | None
    feature_map: str | None = None
    eps: float = 1e-6
    scale: float | None = None

    @property
    def name(self) -> str:
        return f"{self.normalizer or 'simple_la'}-{self.feature_map or 'identity'}"

    def __call__(self, q, k, v, impl: str | None = "triton") -> torch.Tensor:
        options = {"feature_map": self.feature_map, "impl": impl}
        if self.normalizer is None:
            return fbila.simple_la(q, k, v, scale=self.scale, **options)
        return fbila.linear_attn(q, k, v, eps=self.eps, normalizer=self.normalizer, **options)


MEAN = Variant("mean", "elu1", 1e-4)
SUM = Variant("sum", "relu", 1e-15)
SIMPLE = Variant(None)
VARIANTS = [MEAN, SUM, SIMPLE]
# Every feature map with and without a denominator; the identity is for positive inputs.
ALL_VARIANTS = [*VARIANTS, Variant("mean"), Variant("mean", "relu"), Variant("sum", "elu1"),
                Variant(None, "elu1"), Variant(None, "relu", scale=0.01)]  # fmt: skip


def make_qkv(shape, dtype, *, variant: Variant = MEAN, seed: int = 0, away_from_zero: bool = False):
    """q, k, v and do of `shape` = (B, H, N, M, K, V).

    Normalised without a feature map, q and k are positive: it is the caller's part to map them.
    """
    B, H, N, M, K, V = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    sizes = [(B, H, N, K), (B, H, M, K), (B, H, M, V), (B, H, N, V)]
    q, k, v, do = (
        torch.randn(size, generator=generator, dtype=torch.float64, device=DEVICE) for size in sizes
    )
    if variant.normalizer is not None and variant.feature_map is None:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    if away_from_zero:
        q, k = (x + 0.1 * x.sign() for x in (q, k))
    return [x.to(dtype) for x in (q, k, v, do)]


def eager(q, k, v, variant: Variant) -> torch.Tensor:
    """The operators as a user of PyTorch would write them, computed in the dtype of the inputs."""
    q, k = (MAPS[variant.feature_map](x) for x in (q, k))
    if variant.normalizer is None:
        scale = q.shape[-1] ** -0.5 if variant.scale is None else variant.scale
        return (q * scale) @ (k.transpose(-1, -2) @ v)
    if variant.normalizer == "mean":
        root = k.shape[-2] ** -0.5
        kv, key_sum = (k * root).transpose(-1, -2) @ (v * root), k.mean(-2, keepdim=True)
    else:
        kv, key_sum = k.transpose(-1, -2) @ v, k.sum(-2, keepdim=True)
    return (q @ kv) / (q @ key_sum.transpose(-1, -2) + variant.eps)


def run(function: Callable, q, k, v, do=None) -> list[torch.Tensor]:
    """o, and dq, dk, dv where `do` is given, of `function(q, k, v)`."""
    if do is None:
        return [function(q, k, v)]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def assert_equations(actual, expected) -> None:
    """The same up to the rounding of float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def assert_derivatives(function: Callable, leaves: list[torch.Tensor], impl: str) -> None:
    """The gradients of `function(*leaves, impl=impl)` are what differences say, in every entry.

    That takes hundreds of calls. Where the interpreter has to make them, the kernels and their
    gradients equal the reference instead, of which differences are taken; test_gradcheck takes
    those of the kernels.
    """
    if CUDA or impl == "reference":
        assert torch.autograd.gradcheck(lambda *x: function(*x, impl=impl), leaves)
        return
    results = [function(*leaves, impl=which) for which in (impl, "reference")]
    results = [(o,) if isinstance(o, torch.Tensor) else o for o in results]
    for actual, expected in zip(*results, strict=True):
        assert_equations(actual, expected)
        do = torch.arange(expected.numel()).to(expected).cos().view_as(expected)
        gradients = (
            torch.autograd.grad(o, leaves, do, retain_graph=True, materialize_grads=True)
            for o in (actual, expected)
        )
        for x, y in zip(*gradients, strict=True):
            assert_equations(x, y)


def assert_on_rail(actual, truth, *, factor: float = 1.0) -> None:
    """A result within the ceiling of its dtype, as a share of the largest entry of `truth`."""
    error = float((actual.double() - truth).abs().max())
    bound = factor * RAILS[actual.dtype][0] * float(truth.abs().max())
    assert error <= bound, f"{actual.dtype}: error {error:.3e} exceeds {bound:.3e}"


def term_sizes(q, k, v, do, variant: Variant) -> list[torch.Tensor]:
    """The largest terms whose sums are o, dq, dk and dv: rounding is relative to these.

    Gradients of a normalised operator cancel: with a single key dq is 0 exactly, whoever rounds.
    """
    q, k = (x.detach().double().requires_grad_() for x in (q, k))
    phi_q, phi_k = (MAPS[variant.feature_map](x) for x in (q, k))
    v, do, f, g = (x.detach().double() for x in (v, do, phi_q, phi_k))
    kv, key_sum = g.transpose(-1, -2) @ v, g.sum(-2, keepdim=True)
    M = k.shape[-2]
    if variant.normalizer is None:
        scale = g.shape[-1] ** -0.5 if variant.scale is None else variant.scale
        o, g_o, g_den = scale * f @ kv, scale * do, torch.zeros_like(do[..., :1])
    else:
        den = f @ key_sum.transpose(-1, -2) + variant.eps * (
            M if variant.normalizer == "mean" else 1
        )
        o = f @ kv / den
        g_o, g_den = do / den, (do.abs() * o.abs()).sum(-1, keepdim=True) / den
    dkv, dkey_sum = f.transpose(-1, -2) @ g_o, f.transpose(-1, -2) @ g_den
    dphi_q = g_o.abs() @ kv.abs().transpose(-1, -2) + g_den.abs() * key_sum.abs()
    dphi_k = v.abs() @ dkv.abs().transpose(-1, -2) + dkey_sum.abs().transpose(-1, -2)
    dq, dk = (torch.autograd.grad(y, x, d)[0] for y, x, d in
              ((phi_q, q, dphi_q), (phi_k, k, dphi_k)))  # fmt: skip
    return [o, dq, dk, g.abs() @ dkv.abs()]


def assert_in_budget(actual, plain, truth, size, *, backward: bool, name: str = "o") -> None:
    """`|actual - truth| <= c (|plain - truth| + eps size)`, c = 2 or 3, and within the rail."""
    dtype, factor = actual.dtype, 3 if backward else 2
    limits = torch.finfo(dtype)
    assert actual.shape == truth.shape, f"{name}: {actual.shape} is not {truth.shape}"
    if actual.numel() == 0:
        return
    size = float(size.abs().max())
    error = float((actual.double() - truth).abs().max())
    plain_error = float((plain.double() - truth).abs().max())
    bound = RAILS[dtype][backward] * size
    # The rail alone holds where plain PyTorch overflows, and in float64, which is the truth.
    if plain_error < float("inf") and dtype != torch.float64:
        bound = min(bound, factor * (plain_error + limits.eps * size))
    bound += limits.smallest_normal * limits.eps  # the step of subnormal numbers
    assert error <= bound, (
        f"{name} {dtype}: error {error:.3e} exceeds {bound:.3e} (plain PyTorch: "
        f"{plain_error:.3e}, size of terms {size:.3e})"
    )


def assert_accurate(q, k, v, do, variant: Variant, *, impl="triton", backward=True) -> None:
    """Forward and, with `backward`, all three gradients of `variant` are within the budget."""
    gradient = do if backward else None
    actual = run(lambda *x: variant(*x, impl=impl), q, k, v, gradient)
    plain = run(lambda *x: eager(*x, variant), q, k, v, gradient)
    wide = [x.double() for x in (q, k, v)]
    truth = run(lambda *x: eager(*x, variant), *wide, do.double() if backward else None)
    sizes = term_sizes(q, k, v, do, variant) if backward else truth
    for i, name in enumerate(["o", "dq", "dk", "dv"][: len(actual)]):
        assert_in_budget(
            actual[i], plain[i], truth[i], sizes[i], backward=i > 0, name=f"{variant.name} {name}"
        )


def assert_same_bits(actual, expected, *, reordered: bool = False) -> None:
    """Equal bit for bit; where a GPU adds in another order (`reordered`), to 64 eps of the largest.

    The interpreter has one order for all. On a GPU the compiler lays a tile over the threads by
    its axis that is contiguous in memory, and the order of some sums follows.
    """
    for x, y in zip(actual, expected, strict=True):
        if reordered and CUDA and y.numel():
            bound = 64 * torch.finfo(y.dtype).eps * y.abs().max()
            assert (x - y).abs().max() <= bound
        else:
            assert torch.equal(x, y)


# Layouts: the same values behind other strides. What lies between them in memory is NaN.


def _hole(shape, x) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)


def _token_major(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _packed_qkv(x):
    """One of three in `(B, N, 3, H, D)`, as nn.Linear(dim, 3 * dim) makes them."""
    B, H, N, D = x.shape
    packed = _hole((B, N, 3, H, D), x)
    packed[:, :, 1] = x.transpose(1, 2)
    return packed[:, :, 1].transpose(1, 2)


def _token_contiguous(x):
    """`(B, H, D, N)` as convolutions make it, seen as `(B, H, N, D)`."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _offset_by_one(x):
    flat = _hole((x.numel() + 1,), x)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


def _sliced_last_dim(x):
    wide = _hole((*x.shape[:3], x.shape[3] + 1), x)
    wide[..., :-1] = x
    return wide[..., :-1]


def _every_second_token(x):
    B, H, N, D = x.shape
    wide = _hole((B, H, 2 * N, D), x)
    wide[:, :, ::2] = x
    return wide[:, :, ::2]


def _surrounded(x):
    """In the middle of a tensor that is larger on every side, beyond any tile."""
    B, H, N, D = x.shape
    wide = _hole((B + 2, H + 2, N + 256, D + 256), x)
    view = wide[1 : B + 1, 1 : H + 1, 128 : N + 128, 128 : D + 128]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "token_major": _token_major,
    "packed_qkv": _packed_qkv,
    "token_contiguous": _token_contiguous,
    "offset_by_one": _offset_by_one,
    "sliced_last_dim": _sliced_last_dim,
    "every_second_token": _every_second_token,
    "surrounded": _surrounded,
}
