"""A record as the lines that are printed."""

from ..unet.goals import GIB
from ..unet.report import goal_words, ratio, reason


def lines(name: str, record: dict) -> list[str]:
    """A line for each attention and each goal, or one that says why there is none."""
    if "attentions" not in record:
        return [f"{name}  {record['status']}: {record['reason']}"]
    outcomes = record["attentions"]
    first = next(iter(outcomes))
    printed = [f"{name}  {what:<8} {_outcome(o, record, first)}" for what, o in outcomes.items()]
    return printed + [f"{name}  {goal_words(goal)}" for goal in record["goals"]]


def throughput(outcome: dict, record: dict) -> float | None:
    """Pictures a second, if it was measured."""
    ms = outcome.get("ms")
    return None if ms is None else record["case"]["batch"] / ms * 1e3


def _outcome(outcome: dict, record: dict, reference: str) -> str:
    words = reason(outcome)
    if words is not None:
        return words
    parts = [
        f"{throughput(outcome, record):.1f} images/s",
        f"{outcome['ms']:.2f} ms [{outcome['ms_20']:.2f}, {outcome['ms_80']:.2f}]",
    ]
    if outcome["peak_bytes"] is not None:
        parts.append(f"peak {outcome['peak_bytes'] / GIB:.2f} GiB")
    outcomes = record["attentions"]
    times = ratio(outcomes[reference], {"this": outcome}, "this")
    if times is not None and outcome is not outcomes[reference]:
        parts.append(f"{times:.2f} x the throughput of {reference}")
    parts.append(f"error {outcome['errors']['float32']:.1e}")
    return "; ".join(parts)
