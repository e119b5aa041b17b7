"""What an adapter did to a model: which modules it swapped, which it skipped, and why."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


class AdapterError(ValueError):
    """The model cannot be changed as asked. It is as it was before the call."""


@dataclass(frozen=True)
class Entry:
    """One module of the model, of attention where nothing else is said.

    Attributes:
        name: Its path in the model.
        source: Class of the module that the model came with.
        heads, head_dim: Its shape; 0 if its class does not say, or is no attention.
        target: Class of the module that takes its place, `""` if it is skipped.
        reason: Why it is skipped, `""` if it is swapped.
    """

    name: str
    source: str
    heads: int
    head_dim: int
    target: str = ""
    reason: str = ""

    @property
    def shape(self) -> str:
        """`heads x head_dim`, as it is printed; `""` if it has none."""
        return f"{self.heads} x {self.head_dim}" if self.heads else ""


@dataclass(frozen=True)
class LayerDrift:
    """How far a new module's answer is from that of the module it replaces, given the same input.

    Attributes:
        name: Its path in the model.
        tokens: Length of the sequence.
        error: ||new - original|| / ||original||.
        finite: Whether the new answer has neither NaN nor Inf.
    """

    name: str
    tokens: int
    error: float
    finite: bool


@dataclass(frozen=True)
class SwapReport:
    """The modules of a model that an adapter looked at, swapped and skipped.

    Attributes:
        model: Class of the model.
        swapped, skipped: One entry a module, in the model's order.
        added_parameters: Parameters that the new modules have and the originals had not.
        kept_bytes: Size of the originals, which stay in memory so that they can come back.
    """

    model: str
    swapped: tuple[Entry, ...]
    skipped: tuple[Entry, ...]
    added_parameters: int = 0
    kept_bytes: int = 0

    def reasons(self) -> Counter[str]:
        """How many modules were skipped for each reason."""
        return Counter(entry.reason for entry in self.skipped)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists and numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.swapped)} swapped, {len(self.skipped)} skipped"]
        rows = [(e.name, e.shape, f"{e.source} -> {e.target}") for e in self.swapped]
        rows += [(e.name, e.shape, f"skipped: {e.reason}") for e in self.skipped]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines += [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows]
        if self.swapped:
            lines.append(
                f"  {self.added_parameters / 1e6:.1f}M parameters added, originals kept: "
                f"{self.kept_bytes / 2**20:.0f} MiB"
            )
        return "\n".join(lines)


def require_match(report: SwapReport, plan: str = "fbila.adapters.plan") -> None:
    """Refuses to do nothing.

    Args:
        report: What would be swapped.
        plan: The function that made it, for the words of the error.

    Raises:
        AdapterError: If no module of the report is to be swapped.
    """
    if report.swapped:
        return
    first = {entry.reason: entry.name for entry in reversed(report.skipped)}
    counts = ", ".join(
        f"{count} skipped ({why}; for example {first[why]})"
        for why, count in report.reasons().items()
    )
    raise AdapterError(
        f"No attention module was swapped in {report.model}. {len(report.skipped)} were looked at"
        f"{': ' + counts if counts else ''}. Run {plan}(model) to see each reason."
    )
