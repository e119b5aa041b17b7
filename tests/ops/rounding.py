"""How far from the truth honest rounding may take every result of the operators, entry by entry.

`Rounded` numbers carry the variance of their error through the formulas of docs/math.md. Every
operation adds the rounding of its own result, and a sum that of its terms: an entry whose terms
cancel is measured by the terms. Errors are taken for independent, and small.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fbila import Rotary
from fbila.ops.feature_maps import FEATURE_MAPS


@dataclass
class Rounded:
    """The numbers `value`, the `variance` of their error, and the `unit` of the type that they are
    computed in: the largest relative error of one operation. Everything is in float64."""

    value: torch.Tensor
    variance: torch.Tensor
    unit: float

    @staticmethod
    def exact(x: torch.Tensor, unit: float) -> "Rounded":
        x = x.detach().double()
        return Rounded(x, torch.zeros_like(x), unit)

    def __add__(self, other: "Rounded") -> "Rounded":
        return self._result(self.value + other.value, self.variance + other.variance)

    def __neg__(self) -> "Rounded":
        return Rounded(-self.value, self.variance, self.unit)

    def __mul__(self, other: "Rounded") -> "Rounded":
        variance = self.variance * other.value**2 + self.value**2 * other.variance
        return self._result(self.value * other.value, variance)

    def __matmul__(self, other: "Rounded") -> "Rounded":
        value = self.value @ other.value
        variance = self.variance @ other.value**2 + self.value**2 @ other.variance
        squares = self.value**2 @ other.value**2 + value**2
        return Rounded(value, variance + self.value.shape[-1] * self.unit**2 * squares, self.unit)

    def sum(self, *axes: int) -> "Rounded":
        value = self.value.sum(axes, keepdim=True)
        terms = self.value.numel() // max(1, value.numel())
        squares = (self.value**2).sum(axes, keepdim=True) + value**2
        variance = self.variance.sum(axes, keepdim=True) + terms * self.unit**2 * squares
        return Rounded(value, variance, self.unit)

    def power(self, exponent: float) -> "Rounded":
        """Of positive numbers, by logarithms if `exponent` is no small integer."""
        value = self.value**exponent
        slope = exponent * self.value ** (exponent - 1)
        own = exponent * (4 + self.value.log2().abs()) * self.unit * value
        return self._result(value, self.variance * slope**2 + own**2)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Rounded":
        """The same numbers elsewhere: transposed, sliced, repeated."""
        return Rounded(move(self.value), move(self.variance), self.unit)

    @property
    def T(self) -> "Rounded":
        return self.moved(lambda x: x.transpose(-1, -2))

    def stored(self, dtype: torch.dtype, *, rescaled: bool = False) -> "Rounded":
        """Rounded to `dtype`; `rescaled`: as if that had no subnormal numbers."""
        limits, size = torch.finfo(dtype), self.value.abs()
        error = size * limits.eps / 2
        if not rescaled:
            # Half a step of subnormal numbers, but of 0 nothing.
            error = error.clamp(min=limits.smallest_normal * limits.eps / 2).minimum(size)
        return Rounded(self.value, self.variance + error**2, self.unit)

    def _result(self, value: torch.Tensor, variance: torch.Tensor) -> "Rounded":
        return Rounded(value, variance + (self.unit * value) ** 2, self.unit)


def joined(numbers: list[Rounded], join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Rounded:
    """`join` of the values, and of the variances."""
    value, variance = (join([getattr(x, part) for x in numbers]) for part in ("value", "variance"))
    return Rounded(value, variance, numbers[0].unit)


def unit_of(dtype: torch.dtype) -> float:
    """That of the type that sums over `dtype` are kept in."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2


def features(x: torch.Tensor, feature_map: str | None, dtype: torch.dtype):
    """phi(x) and phi'(x); of "signed" the slopes in what it makes features of, x and -x."""
    unit = unit_of(dtype)
    if feature_map == "signed":
        x = torch.cat((x, -x), -1)
        feature_map = "relu"
    x = x.detach().double().requires_grad_()
    phi = FEATURE_MAPS[feature_map](x) * 1
    (slope,) = torch.autograd.grad(phi.sum(), x)
    phi, x = phi.detach(), x.detach()
    # The argument of exp is rounded before.
    return Rounded(phi, ((4 + x.abs()) * unit * phi) ** 2, unit), Rounded.exact(slope, unit)


def turned(x: Rounded, rotary: Rotary | None, dtype: torch.dtype, *, back: bool = False) -> Rounded:
    """`x` rotated, or back, by tables as the kernels keep them for tensors of `dtype`."""
    if rotary is None:
        return x
    kept = dtype if dtype.itemsize > 2 else torch.float16
    cos, sin = (Rounded.exact(t, x.unit).stored(kept) for t in (rotary.cos, rotary.sin))
    sin = -sin if back else sin
    if rotary.interleaved:
        a, b = (x.moved(lambda t, i=i: t[..., i::2]) for i in (0, 1))
    else:
        a, b = (x.moved(lambda t, i=i: t.chunk(2, -1)[i]) for i in (0, 1))
    pair = [a * cos + -(b * sin), b * cos + a * sin]
    if rotary.interleaved:
        return joined(pair, lambda t: torch.stack(t, -1).flatten(-2))
    return joined(pair, lambda t: torch.cat(t, -1))


def attention(
    f: Rounded,
    g: Rounded,
    v: torch.Tensor,
    do: torch.Tensor,
    dtype: torch.dtype,
    *,
    normalizer: str | None,
    eps: float = 0.0,
    scale: float = 1.0,
    of_q: Rotary | None = None,
    of_k: Rotary | None = None,
    weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> dict[str, Rounded]:
    """o, df, dg, dv and dw for features f `(B, H, N, K)` and g `(B, Hk, M, K)` in `dtype`.

    weight `(B, Hk, M)`; mask bool `(B, M)`.
    """
    heads, unit = g.value.shape[1], f.unit
    group = f.value.shape[1] // heads
    v, do = Rounded.exact(v, unit), Rounded.exact(do, unit)
    count = torch.full((v.value.shape[0], 1, 1, 1), v.value.shape[2]).to(v.value)
    if mask is not None:
        there = mask[:, None, :, None].to(v.value)
        count = there.sum(2, keepdim=True)
        g, v = (x.moved(lambda t: t * there) for x in (g, v))
    w = None if weight is None else Rounded.exact(weight[..., None], unit)
    factor = 1 / count.clamp(min=1) if normalizer else torch.full_like(count, scale)
    factor = Rounded.exact(factor, unit)

    def each(x: Rounded) -> Rounded:
        return x.moved(lambda t: t.repeat_interleave(group, 1))

    def shared(x: Rounded) -> Rounded:
        return x.moved(lambda t: t.unflatten(1, (heads, group))).sum(2).moved(lambda t: t[:, :, 0])

    weighed = g if w is None else g * w
    f_turned = turned(f, of_q, dtype).stored(dtype)
    g_turned = turned(weighed, of_k, dtype).stored(dtype, rescaled=w is not None)
    S = each((g_turned.T @ v) * factor).stored(dtype, rescaled=True)
    o = f_turned @ S
    dfeature = turned(do @ S.T, of_q, dtype, back=True)
    if normalizer:
        f_stored, z = f.stored(dtype), each(weighed.sum(-2) * factor)
        eps = eps * (factor.value if normalizer == "sum" else 1) + (count == 0).to(count)
        d = (f_stored * z).sum(-1) + Rounded.exact(eps, unit)
        inverse = Rounded(1 / d.value, d.variance / d.value**4, unit)
        o = o * inverse
        dd = -((f_stored * dfeature).sum(-1) * inverse * inverse)
        df = dfeature * inverse + dd * z
        dS = (f_turned * inverse).stored(dtype, rescaled=True).T @ do
        dz = shared((dd * f_stored).sum(-2)) * factor
    else:
        df, dS = dfeature, f_turned.T @ do
    dS = (shared(dS) * factor).stored(dtype, rescaled=True)
    dg = turned(v @ dS.T, of_k, dtype, back=True)
    if normalizer:
        dg = dg + dz
    results = {"o": o, "df": df, "dg": dg, "dv": g_turned @ dS}
    if w is not None:
        results["dw"] = (g * dg).sum(-1)
        results["dg"] = dg * w
    if mask is not None:
        for name in results.keys() - {"o", "df"}:
            results[name] = results[name].moved(lambda t: t * there)
    return results


def linear_attention(q, k, v, do, feature_map: str | None, **options) -> dict[str, Rounded]:
    """o, dq, dk, dv and dw `(B, Hk, M)`; the options as for `attention`."""
    dtype = q.dtype
    (f, q_slope), (g, k_slope) = (features(x, feature_map, dtype) for x in (q, k))
    results = attention(f, g, v, do, dtype, **options)
    dq, dk = results.pop("df") * q_slope, results.pop("dg") * k_slope
    if feature_map == "signed":
        dq, dk = (
            x.moved(lambda t: t.chunk(2, -1)[0]) + -x.moved(lambda t: t.chunk(2, -1)[1])
            for x in (dq, dk)
        )
    results["dq"], results["dk"] = dq, dk
    if "dw" in results:
        results["dw"] = results["dw"].moved(lambda t: t[..., 0])
    return results


def focused_attention(
    q, k, v, do, power: float, scale: torch.Tensor | None, **options
) -> dict[str, Rounded]:
    """o, dq, dk, dv and, with a scale `(H, K)`, dscale."""
    dtype, unit = q.dtype, unit_of(q.dtype)
    inverse = dinverse = torch.ones(q.shape[1], 1, q.shape[3], device=q.device).double()
    if scale is not None:
        leaf = scale.detach().double().requires_grad_()
        inverse = 1 / F.softplus(leaf).unsqueeze(1)
        (dinverse,) = torch.autograd.grad(inverse.sum(), leaf)
    columns = Rounded(inverse.detach(), (4 * unit * inverse.detach()) ** 2, unit)
    queries, keys = (Focused(x, columns, power) for x in (q, k))
    results = attention(queries.f, keys.f, v, do, dtype, normalizer="mean", **options)
    dcolumns = []
    for name, side in (("q", queries), ("k", keys)):
        results["d" + name], part = side.gradient(results.pop("df" if name == "q" else "dg"), dtype)
        dcolumns.append(part)
    if scale is not None:
        slope = Rounded(dinverse, (4 * unit * dinverse) ** 2, unit)
        total = (dcolumns[0] + dcolumns[1]).moved(lambda t: t[0, :, 0])
        results["dscale"] = total * slope
    return results


class Focused:
    """f(x) of focused linear attention, computed from u = x^ / max x^, and its gradient."""

    def __init__(self, x: torch.Tensor, columns: Rounded, power: float):
        self.columns, self.exponent = columns, power
        x = x.detach().double()
        self.positive = x > 0
        self.x = Rounded.exact(x.relu() + 1e-6, columns.unit)
        hat = self.x * columns
        self.t = Rounded.exact(1 / hat.value.amax((1, 3), keepdim=True), columns.unit)
        self.u = hat * self.t
        self.powers = self.u.power(power)
        self.squares = (self.u * self.u).sum(1, 3)
        ratio = self.squares * (self.powers * self.powers).sum(1, 3).power(-1)
        self.a = ratio.power(0.5)  # w t
        self.f = self.powers * self.a * self.t.power(-1)

    def gradient(self, df: Rounded, dtype: torch.dtype) -> tuple[Rounded, Rounded]:
        """dx and the gradient of columns, from that of f."""
        p = Rounded.exact(torch.full_like(self.t.value, self.exponent), self.t.unit)
        m = (df * self.f).stored(dtype)
        along = m.sum(1, 3) * self.squares.power(-1)
        slope = self.powers * self.u.power(-1) * self.a
        bent = p * slope * slope * self.u * along
        dhat = (p * m * self.u.power(-1) + -bent + self.u * along) * self.t
        dx = (dhat * self.columns).moved(lambda t: t * self.positive)
        return dx, (dhat * self.x).sum(0, 2)
