"""The registry: every row that is measured, with its goals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .goals import GIB, Goal

EVERY = ("sdpa", "official", "fbila", "fbila fused", "fbila fused blocks")
LINEAR = EVERY[1:]
# `fused_blocks` has kernels in a graph for the norms of large pictures alone.
COMPILED = ("sdpa", "official", "fbila fused")
LARGE = (*COMPILED, "fbila fused blocks")
MODES = ("eager", "default", "reduce-overhead", "train", "train-graph")
# What is captured has its memory before it is replayed.
CAPTURED = ("reduce-overhead", "train-graph")


@dataclass(frozen=True)
class Row:
    """One UNet on one size of picture, with several ways to compute its attention.

    Attributes:
        unet: A name in `models.UNETS`.
        px: Pixels along each side.
        mode: "eager", a mode of `torch.compile`, "train": a step of distillation, eager, or
            "train-graph": that step captured in a CUDA graph and replayed.
        attentions: Names in `attentions.WAYS`.
        skipped: Why others are not measured, by name.
    """

    group: str
    unet: str
    px: int
    batch: int = 2
    mode: str = "eager"
    attentions: tuple[str, ...] = EVERY
    skipped: Mapping[str, str] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.group}/{self.unet}/{self.px}"

    @property
    def rounds(self) -> int:
        """How often the attentions take turns: twice, so that a drift of the clocks shows.

        Compiled functions would have to be compiled twice, training starts with an optimizer, and
        steps of seconds take long enough.
        """
        return 2 if self.mode == "eager" and self.px <= 4096 else 1

    @property
    def weighed(self) -> bool:
        """Whether peak memory is measured."""
        return self.mode not in CAPTURED


def _no_slower(factor: float, reference: str, attention: str = "fbila fused") -> tuple[Goal, ...]:
    return (Goal(attention, reference, factor),)


def _eager() -> list[Row]:
    sd15 = {512: (1.10, "sdpa"), 1024: (0.85, "sdpa"), 2048: (0.90, "official")}
    sd15[4096] = sd15[2048]
    sdxl = {1024: (1.10, "sdpa"), 2048: (0.82, "official"), 4096: (0.82, "official")}
    return [
        Row("eager", unet, px, goals=_no_slower(*goal, "fbila fused blocks"))
        for unet, sizes in (("sd15", sd15), ("sdxl", sdxl))
        for px, goal in sizes.items()
    ]


def _compiled() -> list[Row]:
    """In channels_last, which compiled convolutions prefer."""
    at_512 = {"goals": _no_slower(1.0, "sdpa"), "attentions": COMPILED}
    at_1024 = {"goals": _no_slower(0.85, "official"), "attentions": COMPILED}
    large = {"goals": _no_slower(0.85, "official", "fbila fused blocks"), "attentions": LARGE}
    slow = {
        "attentions": LARGE[1:],
        "skipped": {"sdpa": "takes seconds a step, compiled or not: see the eager row"},
    }
    return [
        Row("compiled", "sd15", 512, mode="default", **at_512),
        Row("compiled", "sd15", 1024, mode="default", **at_1024),
        Row("compiled", "sd15", 2048, mode="default", **large),
        Row("compiled", "sd15", 4096, mode="default", **{**large, **slow}),
        *(
            Row("reduce-overhead", "sd15", px, mode="reduce-overhead", attentions=COMPILED)
            for px in (512, 1024)
        ),
        # For the plot.
        *(
            Row("compiled", "sdxl", px, mode="default", attentions=COMPILED)
            for px in (1024, 2048, 4096)
        ),
    ]  # fmt: skip


def _sixteen_k() -> list[Row]:
    """The paper's longest sequence, and half of its side; a single picture without guidance."""
    slow = {"sdpa": "takes half a minute a step and more"}
    goals = _no_slower(0.65, "official", "fbila fused blocks")
    saving = (
        Goal("fbila low memory", None, plus=24 * GIB, quantity="peak_bytes"),
        Goal("fbila low memory", "fbila", 1.4),
    )
    eager = {"attentions": (*LINEAR, "fbila low memory"), "skipped": slow}
    return [
        Row("16k/eager", "sd15", 8192, batch=1, goals=goals, **eager),
        Row("16k/eager", "sd15", 16384, batch=1, goals=(*goals, *saving), **eager),
    ]


def _train(unet: str, px: int) -> list[Row]:
    """As it is, where the device waits for Python, and without Python."""
    best = "fbila fused blocks"
    faster = Goal(best, "official", 0.85)
    lighter = Goal(best, "official", 0.90, quantity="peak_bytes")
    ways = {"batch": 4, "attentions": ("official", "fbila", best)}
    return [
        Row("train", unet, px, mode="train", goals=(faster, lighter), **ways),
        Row("train/graph", unet, px, mode="train-graph", goals=(faster,), **ways),
    ]


ROWS: tuple[Row, ...] = (*_eager(), *_compiled(), *_sixteen_k(), *_train("sd15", 512))

# For trying all of it out on a CPU; the numbers mean nothing.
TINY_ROWS: tuple[Row, ...] = (
    Row("eager", "tiny", 64, goals=_no_slower(1.10, "sdpa", "fbila fused blocks")),
    Row("eager", "tiny", 128, goals=_no_slower(0.90, "official", "fbila fused blocks")),
    Row("compiled", "tiny", 64, mode="default", attentions=EVERY[:2], skipped={"fbila": "slow"}),
    Row("16k/eager", "tiny", 128, batch=1, attentions=("official", "fbila", "fbila low memory"),
        goals=(Goal("fbila low memory", "fbila", 1.4),)),
    *_train("tiny", 64),
)  # fmt: skip


def select(rows: Sequence[Row], prefixes: Sequence[str] = ()) -> list[Row]:
    """The rows whose name begins with one of `prefixes` (none: all), in the registry's order."""
    return [row for row in rows if row.name.startswith(tuple(prefixes) or "")]
