"""The registry: every case that is measured, with its targets and its peers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .targets import Target, fraction_of_floor

EVERY_PEER = ("eager", "compiled", "sdpa", "flash_bla")


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    Attributes:
        layout: Memory order of q, k, v and do: "token_major" is `(B, N, H, D)` read as its
            transposed view, "head_major" is `(B, H, N, D)`.
        option: A name in `operators.OPTIONS`: what is measured against the plain call.
        axis: The quantity that a sweep varies, "N" or "D".
        method: "events" (device events around each call), "graph" (replays of a captured graph) or
            "host" (the time until the call returns).
        passes: Of "forward", "backward" and "forward+backward".
        targets: By pass.
        peers: Names in `peers.PEERS`.
    """

    group: str
    B: int
    N: int
    H: int
    D: int
    M: int | None = None
    operator: str = "linear_attn"
    dtype: str = "bfloat16"
    layout: str = "token_major"
    feature_map: str | None = "elu1"
    option: str | None = None
    axis: str | None = None
    method: str = "events"
    passes: tuple[str, ...] = ("forward", "backward")
    targets: Mapping[str, Target] = field(default_factory=dict)
    peers: tuple[str, ...] = ()

    @property
    def keys(self) -> int:
        """The number of keys, M: that of the queries unless given."""
        return self.N if self.M is None else self.M

    @property
    def shape(self) -> str:
        keys = "" if self.M is None else f"-M{self.M}"
        return f"{self.B}x{self.N}x{self.H}x{self.D}{keys}"

    @property
    def name(self) -> str:
        kind = self.option or self.axis
        parts = [self.group, kind, self.operator, self.shape, self.dtype, self.layout]
        return "/".join(part for part in parts if part)

    @property
    def target_peers(self) -> tuple[str, ...]:
        """The peers without which a target cannot be judged."""
        references = {target.reference for target in self.targets.values()}
        return tuple(peer for peer in self.peers if peer in references)

    def plain(self) -> "Case":
        """The call that an option is measured against."""
        feature_map = None if self.option == "feature_map" else self.feature_map
        return replace(self, option=None, feature_map=feature_map)


def _large() -> list[Case]:
    """Bound by memory: what fraction of a copy's speed is reached."""
    shapes = [
        (8, 16384, 16, 64), (2, 32768, 16, 64), (2, 262144, 8, 40), (2, 131072, 8, 80),
        (2, 65536, 8, 160), (2, 32768, 70, 32), (2, 65536, 20, 112), (2, 32768, 20, 128),
        (1, 65536, 16, 256),
    ]  # fmt: skip
    cases = []
    for shape in shapes:
        forward, backward = (0.60, 0.50) if shape[-1] == 256 else (0.90, 0.85)
        targets = {
            "forward": fraction_of_floor(forward),
            "backward": fraction_of_floor(backward),
        }
        token_major = Case("large", *shape, targets=targets, peers=EVERY_PEER)
        # flash_bla copies token-major inputs; head-major is its own order.
        head_major = replace(token_major, layout="head_major", peers=("flash_bla",))
        cases += [token_major, head_major]
        cases += [replace(case, dtype="float16", peers=()) for case in (token_major, head_major)]
    return [*cases, replace(cases[0], operator="simple_la")]


def _middle() -> list[Case]:
    """Attention of diffusion models at everyday sizes: launches begin to matter."""
    shapes = [
        (2, 4096, 8, 40), (2, 4096, 10, 64), (2, 1024, 20, 64), (2, 4096, 70, 32),
        (8, 1024, 16, 64),
    ]  # fmt: skip
    targets = {"forward": Target("floor", 1.5, plus_ms=6e-3)}
    return [
        Case("middle", *shape, method="graph", targets=targets, peers=EVERY_PEER)
        for shape in shapes
    ]


def _vit() -> list[Case]:
    """Lengths at which softmax attention is at its best."""
    passes = ("forward", "forward+backward")
    targets = dict.fromkeys(passes, Target("sdpa", 0.8))
    shapes = [(64, 197, 12, 64), (64, 577, 16, 64), (16, 1024, 16, 64), (64, 256, 6, 64)]
    return [
        Case("vit", *shape, method="graph", passes=passes, targets=targets, peers=EVERY_PEER)
        for shape in shapes
    ]


def _host() -> list[Case]:
    """What Python and the launches cost, on tensors too small to matter."""
    targets = {
        "forward": Target(None, plus_ms=35e-3),
        "forward+backward": Target(None, plus_ms=100e-3),
    }
    passes = tuple(targets)
    return [
        Case("host", 1, 64, 4, 64, method="host", passes=passes, targets=targets,
             peers=("eager", "sdpa"))
    ]  # fmt: skip


def _options() -> list[Case]:
    """What an option costs over the call without it."""
    factors = {
        "feature_map": 1.03,
        "rotary": 1.15,
        "key_weight": 1.10,
        "cu_seqlens": 1.10,
        "state": 1.05,
    }
    return [
        Case("options", 8, 16384, 16, 64, option=option,
             targets=dict.fromkeys(("forward", "backward"), Target("plain", factor)))
        for option, factor in factors.items()
    ]  # fmt: skip


def _sweep() -> list[Case]:
    """For the plots: time against length, and the fraction of the floor by head dim."""
    lengths = [256 * 4**i for i in range(6)]
    cases = [
        Case("sweep", 2, N, 16, 64, axis="N", method="graph", peers=EVERY_PEER) for N in lengths
    ]
    head_dims = (16, 32, 40, 64, 80, 96, 112, 128, 160, 192, 256)
    # About as many bytes for each head dim, in whole blocks of 64 tokens.
    return cases + [
        Case("sweep", 2, 2**21 // D // 64 * 64, 16, D, axis="D") for D in head_dims
    ]  # fmt: skip


CASES: tuple[Case, ...] = (
    *_large(), *_middle(), *_vit(), *_host(), *_options(), *_sweep(),
)  # fmt: skip
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(case.group for case in CASES))


def select(groups: list[str] | None = None, substring: str = "") -> list[Case]:
    """The cases of `groups` (None: all) whose name has `substring`, in the registry's order."""
    return [
        case for case in CASES if (not groups or case.group in groups) and substring in case.name
    ]


def find(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
