"""Random calls of every function with every option: what is called, and the tensors."""

from random import Random
from typing import NamedTuple

import torch
from helpers import CUDA, DEVICE, DTYPES, LAYOUTS

import fbila
from fbila.ops.feature_maps import feature_dim

# Seeds with the same options, head dims and layouts, for which a GPU compiles once.
SHARING = 6 if CUDA else 1
WIDTHS = [16, 32, 40, 64, 80, 96, 112, 128, 160, 256]
EDGES = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


class Options(NamedTuple):
    """Of a case, all that a GPU compiles anew for."""

    function: str
    dtype: torch.dtype
    feature_map: str | None
    normalizer: str | None
    eps: float
    scale: float | None
    power: float
    K: int
    V: int
    layouts: tuple[str | None, ...]  # of q, k, v and do
    grouped: bool
    packed: bool
    rotary: str | None
    table_per_head: bool
    table_dtype: torch.dtype
    weight: str | None
    weight_dtype: torch.dtype
    mask: str | None
    scaled: bool
    wanted: tuple[str, ...]


class Case(NamedTuple):
    """One call; `lengths` are those of packed sequences, of which the batch is one."""

    seed: int
    options: Options
    B: int
    H: int
    Hk: int
    N: int
    M: int
    lengths: tuple[int, ...] | None
    index_dtype: torch.dtype
    cut: int  # where the keys of two states are parted
    magnitude: float


def random_case(seed: int) -> Case:
    """The same for the same seed."""
    options = random_options(Random(f"options {seed // SHARING}"))
    random = Random(f"sizes {seed}")
    width = max(feature_dim(options.K, options.feature_map), options.V)
    if CUDA:
        rows, numbers, longest = 24, 3_000_000, 6000
    else:
        # The interpreter runs one program after the other, many of them for wide heads.
        rows, longest = (6 if width <= 64 else 4 if width <= 128 else 2), 130
        numbers = 32000 // options.dtype.itemsize
    group = random.randint(2, min(4, max(2, rows // 2))) if options.grouped else 1
    Hk = random.randint(1, min(3, rows // group))
    B = 1 if options.packed else random.randint(1, min(3, rows // group // Hk))
    tokens = min(longest, numbers // (B * Hk * group * width))
    N, M = (random_length(random, tokens) for _ in range(2))
    lengths = None
    if options.packed:
        lengths = random_lengths(random, N, rows)
        N = M = sum(lengths)
    elif options.rotary and options.function != "halves":
        M = N
    return Case(
        seed=seed,
        options=options,
        B=B,
        H=Hk * group,
        Hk=Hk,
        N=N,
        M=M,
        lengths=lengths,
        index_dtype=random.choice([torch.int32, torch.int64]),
        cut=random.randint(0, M),
        magnitude=random.choice([1.0, 1.0, 0.1, 3.0]),
    )


def random_options(random: Random) -> Options:
    function = random.choices(["linear_attn", "simple_la", "halves", "focused_la"], [4, 2, 3, 2])[0]
    focused = function == "focused_la"
    normalizer = random.choice(["mean", "sum"])
    normalizer = {"simple_la": None, "focused_la": "mean"}.get(function, normalizer)
    feature_map = random.choice([None, "elu1", "elu1", "relu", "relu_offset", "exp", "signed"])
    rotary = None if focused else random.choice([None, None, "interleaved", "halves"])
    K, V = random_width(random), random_width(random)
    if feature_map == "signed" and not focused:
        K = min(K, 128)
    grouped = not focused and random.random() < 0.4
    weight = None if focused else random.choice([None, None, "shared", "per head"])
    scaled = focused and random.random() < 0.7
    names = ["q", "k", "v", *(["weight"] if weight else []), *(["scale"] if scaled else [])]
    options = Options(
        function=function,
        dtype=random.choices([*DTYPES, torch.float64], [3] * len(DTYPES) + [1])[0],
        feature_map=None if focused else feature_map,
        normalizer=normalizer,
        eps=random_eps(random, normalizer, feature_map, rotary, weight),
        scale=random.choice([None, 1.0, -0.02]) if function == "simple_la" else None,
        power=random.choice([3, 3, 2, 1, 2.5, 8]) if focused else 1,
        K=K + K % 2 if rotary else K,
        V=K if random.random() < 0.3 else V,
        layouts=tuple(
            random.choice([None, None, *LAYOUTS, *(["expanded"] if name == "do" else [])])
            for name in ("q", "k", "v", "do")
        ),
        grouped=grouped,
        packed=function in ("linear_attn", "simple_la") and random.random() < 0.35,
        rotary=rotary,
        table_per_head=rotary is not None and not grouped and random.random() < 0.4,
        table_dtype=random.choice([*FLOATS, torch.float64]),
        weight=weight,
        weight_dtype=random.choice(FLOATS),
        mask=random.choice([None, None, "zeros", "nan"]),
        scaled=scaled,
        wanted=tuple(
            names if random.random() < 0.6 else random.sample(names, random.randint(1, len(names)))
        ),
    )
    if focused and options.dtype == torch.float16 and options.eps == 0:
        # Powers of small channels sink to 0 there, and with them whole denominators: 0 / 0.
        return options._replace(eps=1e-6)
    return options


def random_eps(
    random: Random,
    normalizer: str | None,
    feature_map: str | None,
    rotary: str | None,
    weight: str | None,
) -> float:
    if rotary and feature_map in ("relu", "relu_offset", "signed"):
        # Turned, features may add up where those of the denominator do not.
        return 0.3 if normalizer == "mean" else 1.0
    if weight is None and feature_map in (None, "elu1", "exp") and random.random() < 0.2:
        return 0.0
    return random.choice([1e-6, 1e-4, 0.3] if normalizer == "mean" else [1e-15, 1e-4, 1.0])


def random_width(random: Random) -> int:
    if random.random() < 0.7:
        return random.choice(WIDTHS)
    return random.randint(1, random.choice([64, 128, 256]))


def random_length(random: Random, most: int) -> int:
    return min(most, random.choice([*EDGES, *(random.randint(1, most) for _ in EDGES)]))


def random_lengths(random: Random, tokens: int, most: int) -> tuple[int, ...]:
    """Of some sequences, about `tokens` in all; of hundreds where it does not take long."""
    if CUDA and random.random() < 0.05:
        return tuple(random.randint(0, 5) for _ in range(random.randint(250, 600)))
    share = max(1, tokens // 2)
    lengths = [random.choice([0, 1, 17, 33, random.randint(1, share), random.randint(1, share)])
               for _ in range(random.randint(0, most - 1))]  # fmt: skip
    return (*lengths, random.randint(1, share))


class Tensors(NamedTuple):
    """Of a case; all `(B, H, N, D)`, also the packed ones. of_q and of_k: the tables."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor
    of_q: fbila.Rotary | None
    of_k: fbila.Rotary | None
    weight: torch.Tensor | None
    mask: torch.Tensor | None
    scale: torch.Tensor | None


def make_tensors(case: Case) -> Tensors:
    seed, options, B, H, Hk, N, M, *_, magnitude = case
    generator = torch.Generator(DEVICE).manual_seed(seed)
    made = {"generator": generator, "dtype": torch.float64, "device": DEVICE}
    q, k = (torch.randn(size, **made) for size in ((B, H, N, options.K), (B, Hk, M, options.K)))
    v, do = (torch.randn(size, **made) for size in ((B, Hk, M, options.V), (B, H, N, options.V)))
    if options.normalizer and options.function != "focused_la" and options.feature_map is None:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    v, do = v * magnitude, do * magnitude
    if options.feature_map != "exp":
        q, k = q * magnitude, k * magnitude

    weight = mask = scale = None
    if options.weight:
        weight = torch.rand((B, M) if options.weight == "shared" else (B, Hk, M), **made)
        weight = torch.where(weight < 0.1, 0, 2 * weight) - int(options.normalizer is None)
    if options.mask:
        mask = torch.rand(B, M, **made) < 0.7
        mask[0, torch.randint(M, (1,), generator=generator, device=DEVICE)] = True
    if options.mask == "nan":
        for x in (k, v):
            x.masked_fill_(~mask[:, None, :, None], float("nan"))
        if weight is not None:
            weight.masked_fill_(~(mask if weight.dim() == 2 else mask[:, None]), float("nan"))
    if weight is not None:
        weight = weight.to(options.weight_dtype)
    if options.scaled:
        scale = torch.randn(H, options.K, **made).to(options.weight_dtype)
    if seed % 2:
        # Every second number in memory.
        weight, mask = (
            None if x is None else x.repeat_interleave(2, -1)[..., ::2] for x in (weight, mask)
        )

    of_q = of_k = None
    if options.rotary:
        heads = (H,) if options.table_per_head else ()
        pairs = feature_dim(options.K, options.feature_map) // 2
        of_q, of_k = (
            fbila.Rotary(
                *(x.to(options.table_dtype) for x in (angles.cos(), angles.sin())),
                interleaved=options.rotary == "interleaved",
            )
            for angles in (3 * torch.randn(*heads, n, pairs, **made) for n in (N, M))
        )
        of_k = of_k if options.function == "halves" else of_q
    q, k, v, do = (
        laid_out(x.to(options.dtype), layout)
        for x, layout in zip((q, k, v, do), options.layouts, strict=True)
    )
    return Tensors(q, k, v, do, of_q, of_k, weight, mask, scale)


def laid_out(x: torch.Tensor, layout: str | None) -> torch.Tensor:
    if layout == "expanded":
        # What o.sum().backward() passes.
        return x[:1, :1, :1, :1].expand_as(x)
    return LAYOUTS[layout](x) if layout else x
