"""The tensors of a case, and fbila's function on them, with the case's option."""

from collections.abc import Callable

import torch

import fbila

from .cases import Case

# f(q, k, v, impl=None) -> o
Operator = Callable[..., torch.Tensor]


def make_inputs(case: Case, device: str, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, do: random, in the case's dtype and memory order.

    Normalised without a feature map, q and k must be positive.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(tokens: int) -> torch.Tensor:
        token_major = case.layout == "token_major"
        middle = (tokens, case.H) if token_major else (case.H, tokens)
        dtype = getattr(torch, case.dtype)
        size = (case.B, *middle, case.D)
        x = torch.randn(size, generator=generator, device=device, dtype=dtype)
        return x.transpose(1, 2) if token_major else x

    q, k, v, do = (draw(tokens) for tokens in (case.N, case.keys, case.keys, case.N))
    if case.feature_map is None and case.operator == "linear_attn":
        q, k = q.abs_().add_(0.1), k.abs_().add_(0.1)
    return [q, k, v, do]


def make_operator(case: Case, device: str) -> Operator:
    """fbila's function for `case`; raises NotImplementedError where fbila has no such option."""
    function = getattr(fbila, case.operator)

    def plain(q, k, v, impl=None, **options):
        return function(q, k, v, feature_map=case.feature_map, impl=impl, **options)

    return plain if case.option is None else OPTIONS[case.option](case, device, plain)


def _feature_map(case: Case, device: str, plain: Operator) -> Operator:
    return plain


def _rotary(case: Case, device: str, plain: Operator) -> Operator:
    """cos and sin `(N, D / 2)`, of angles that fall with the channel as in RoFormer."""
    channel = torch.arange(case.D // 2, device=device, dtype=torch.float32)
    token = torch.arange(case.N, device=device, dtype=torch.float32)
    angle = token[:, None] * 10000.0 ** (-2 * channel / case.D)
    rotary = (angle.cos(), angle.sin())
    return lambda q, k, v, impl=None: plain(q, k, v, impl, rotary=rotary)


def _key_weight(case: Case, device: str, plain: Operator) -> Operator:
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.rand(case.B, case.keys, generator=generator, device=device)
    return lambda q, k, v, impl=None: plain(q, k, v, impl, key_weight=weight)


def _cu_seqlens(case: Case, device: str, plain: Operator) -> Operator:
    """As many tokens as the dense call has, in sequences of a half to one and a half times N."""
    shares = torch.linspace(0.5, 1.5, case.B, dtype=torch.float64)
    ends = (shares.cumsum(0) / shares.sum() * case.B * case.N).round()
    cu_seqlens = torch.cat([torch.zeros(1), ends]).to(device, torch.int32)

    def packed(q, k, v, impl=None):
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        o = plain(*rows, impl, cu_seqlens=cu_seqlens)
        return o.unflatten(0, (case.B, case.N)).transpose(1, 2)

    return packed


def _state(case: Case, device: str, plain: Operator) -> Operator:
    """The two halves, each a call of its own; together they are the plain call."""
    # A base to compare with may be older than these functions.
    if not hasattr(fbila, "linear_attn_state"):
        raise NotImplementedError("linear_attn_state is not implemented yet.")
    options = {"feature_map": case.feature_map}

    def halves(q, k, v, impl=None):
        if impl == "reference":
            return plain(q, k, v, impl)
        return fbila.linear_attn_apply(q, fbila.linear_attn_state(k, v, **options), **options)

    return halves


OPTIONS: dict[str, Callable[[Case, str, Operator], Operator]] = {
    "feature_map": _feature_map,
    "rotary": _rotary,
    "key_weight": _key_weight,
    "cu_seqlens": _cu_seqlens,
    "state": _state,
}
