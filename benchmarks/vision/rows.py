"""The registry: every row that is measured, with its goals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..unet.goals import Goal

# Name -> which operations, and whether torch.compile is given them.
WAYS = {
    "eager": ("eager", False),
    "compiled": ("eager", True),
    "fbila": ("fbila", False),
    "fbila compiled": ("fbila", True),
}
BATCH = 64
# Grids of 3136 and 12544 tokens, with as many tokens in a batch.
LAYER_BATCHES = {56: 64, 112: 16}


@dataclass(frozen=True)
class Row:
    """A pass of a model over pictures of one size, or of a layer over grids of one size.

    Attributes:
        part: "models", "graphs", which are models whose step is replayed as a CUDA graph, or
            "layers".
        kind: "inference" in bfloat16; "training", a step of a model under bfloat16 autocast;
            "forward+backward" of a layer in bfloat16.
        host: A name in `models.HOSTS`.
        px: Pixels along each side; of a layer, rows and columns.
        attentions: Names in `WAYS`.
        skipped: Why others are not measured, by name.
    """

    part: str
    kind: str
    host: str
    px: int
    batch: int
    attentions: tuple[str, ...] = ("eager", "compiled", "fbila", "fbila compiled")
    skipped: Mapping[str, str] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()
    # What is compiled is said by the attentions; "graph" is replayed as a CUDA graph.
    mode: str = "each"
    dtype: str = "bfloat16"
    # A second turn would compile everything again.
    rounds: int = 1
    weighed: bool = True

    @property
    def name(self) -> str:
        return f"{self.part}/{self.kind}/{self.host}/{self.px}"


MODELS = ("mlla_tiny", "flatten_swin_tiny", "ravlt_small", "polaformer_swin_tiny")
LAYERS = (
    "focused", "polaformer", "polaformer_pp", "inline", "mlla", "rala", "mala", "vssd", "sana",
    "lite_mla",
)  # fmt: skip


def _faster(times: float) -> tuple[Goal, ...]:
    return (
        Goal("fbila", "eager", 1 / times),
        # A user who compiles would compile either.
        Goal("fbila compiled", "compiled", 1 / times),
    )


def model_rows(names: Sequence[str], sides: Sequence[int], batch: int) -> list[Row]:
    lighter = Goal("fbila", "eager", 0.8, quantity="peak_bytes")
    goals = {"inference": _faster(1.3), "training": (*_faster(1.3), lighter)}
    return [
        Row("models", kind, name, px, batch, goals=goals[kind])
        for kind in goals
        for name in names
        for px in sides
    ]


def graph_rows(names: Sequence[str], side: int, batch: int) -> list[Row]:
    # A graph holds its memory all the time.
    options = {"mode": "graph", "weighed": False, "goals": _faster(1.3)}
    return [Row("graphs", "training", name, side, batch, **options) for name in names]


def layer_rows(names: Sequence[str], batches: Mapping[int, int]) -> list[Row]:
    goals = (Goal("fbila", "eager", 1 / 2.5), Goal("fbila", "compiled", 1 / 2.5))
    # A layer is little but fbila's kernels and matrix products: there is nothing to compile.
    ways = ("eager", "compiled", "fbila")
    return [
        Row("layers", kind, name, px, batch, attentions=ways, goals=goals)
        for kind in ("inference", "forward+backward")
        for name in names
        for px, batch in batches.items()
    ]


ROWS: tuple[Row, ...] = (
    *layer_rows(LAYERS, LAYER_BATCHES),
    *model_rows(MODELS, (224, 512), BATCH),
    # The size at which Python takes longer than the kernels.
    *graph_rows(MODELS, 224, BATCH),
)

# For trying all of it out on a CPU; the numbers mean nothing.
TINY_ROWS: tuple[Row, ...] = (
    *layer_rows([f"tiny_{name}" for name in LAYERS], {6: 2}),
    *model_rows(["tiny"], (32,), 2),
    *graph_rows(["tiny"], 32, 2),
)


def select(rows: Sequence[Row], prefixes: Sequence[str] = ()) -> list[Row]:
    """The rows whose name begins with one of `prefixes` (none: all), in the registry's order."""
    return [row for row in rows if row.name.startswith(tuple(prefixes) or "")]
