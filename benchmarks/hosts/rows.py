"""The registry: every row that is measured, with its goals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..unet.goals import Goal

PASSES = ("inference", "training")
# Of backbones.
MODES = ("eager", "compiled")
# Of a picture's side -> pictures at a time, so that each row has about as many tokens.
BATCHES = {224: 64, 512: 16, 1024: 4, 2048: 1}
# From here on attention is what costs: throughput of 1.5 times softmax's, at least.
LARGE = 1024


@dataclass(frozen=True)
class Row:
    """A pass of one model over pictures of one size, with several ways to compute its attention.

    Attributes:
        kind: "inference", or "training", a step of it under autocast with float32 weights.
        mode: "eager", "compiled", or "graph", a step of training captured in a CUDA graph and
            replayed.
        host: A name in `models.HOSTS`.
        px: Pixels along each side.
        attentions: Names in the host's `ways`.
        skipped: Why others are not measured, by name.
        dtype: Of inference, or of autocast in training. The name has it where it is not bfloat16.
    """

    kind: str
    mode: str
    host: str
    px: int
    batch: int
    attentions: tuple[str, ...] = ("softmax", "linear")
    skipped: Mapping[str, str] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        name = f"{self.kind}/{self.mode}/{self.host}/{self.px}"
        return name if self.dtype == "bfloat16" else f"{name}/{self.dtype}"

    @property
    def rounds(self) -> int:
        """How often they take turns: twice, so that a drift of the clocks shows.

        What is compiled or captured would have to be so twice.
        """
        return 2 if self.mode == "eager" else 1

    @property
    def weighed(self) -> bool:
        """Whether peak memory is measured; a graph holds its own all the time."""
        return self.mode != "graph"


def _backbone(host: str, batches: Mapping[int, int], large: int) -> list[Row]:
    faster = (Goal("linear", "softmax", 1 / 1.5),)
    return [
        Row(kind, mode, host, px, batch, goals=faster if px >= large else ())
        for kind in PASSES
        for mode in MODES
        for px, batch in batches.items()
    ]


ROWS: tuple[Row, ...] = tuple(_backbone("vit_base_patch16", BATCHES, LARGE))

# For trying all of it out on a CPU; the numbers mean nothing.
TINY_ROWS: tuple[Row, ...] = tuple(_backbone("tiny", {32: 2, 64: 1}, 64))


def select(rows: Sequence[Row], prefixes: Sequence[str] = ()) -> list[Row]:
    """The rows whose name begins with one of `prefixes` (none: all), in the registry's order."""
    return [row for row in rows if row.name.startswith(tuple(prefixes) or "")]
