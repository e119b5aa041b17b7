"""A record as the lines that are printed."""

from .goals import GIB

# What an attention has in place of a time.
REASONS = ("skipped", "absent", "out_of_memory", "wrong", "failed")


def lines(name: str, record: dict) -> list[str]:
    """A line for each attention and each goal, or one that says why there is none."""
    if "attentions" not in record:
        return [f"{name}  {record['status']}: {record['reason']}"]
    outcomes = record["attentions"]
    printed = [f"{name}  {what:<16} {_outcome(o, outcomes)}" for what, o in outcomes.items()]
    if "missing_reference" in record:
        why = record["missing_reference"]
        printed.append(f"{name}  compared with official at the smallest size alone: {why}")
    return printed + [f"{name}  {goal_words(goal)}" for goal in record["goals"]]


def reason(outcome: dict) -> str | None:
    """Why there is no time; None where there is one."""
    for status in REASONS:
        if status in outcome:
            return f"{status.replace('_', ' ')}: {outcome[status]}"
    return None


def ratio(outcome: dict, outcomes: dict[str, dict], reference: str) -> float | None:
    """Its time over that of the reference, if both were measured."""
    ms, base = outcome.get("ms"), outcomes.get(reference, {}).get("ms")
    return None if ms is None or base is None else ms / base


def goal_words(goal: dict) -> str:
    words = f"goal {goal['goal']}"
    if goal["over"] is None:
        return f"{words}: not measured"
    return f"{words}: met" if goal["over"] <= 0 else f"{words}: missed by {goal['over']:.1%}"


def summary(records: dict[str, dict]) -> str:
    """How many rows ended how, and how many goals were met."""
    counts: dict[str, int] = {}
    for record in records.values():
        counts[record["status"]] = counts.get(record["status"], 0) + 1
    goals = [goal for record in records.values() for goal in record.get("goals", ())]
    judged = [goal["over"] for goal in goals if goal["over"] is not None]
    words = ", ".join(f"{count} {status}" for status, count in counts.items())
    met = f"{sum(over <= 0 for over in judged)} of {len(judged)} goals met"
    unjudged = len(goals) - len(judged)
    return f"{words or 'no row'}; {met}" + (f", {unjudged} not measured" if unjudged else "")


def _outcome(outcome: dict, outcomes: dict[str, dict]) -> str:
    words = reason(outcome)
    if words is not None:
        return words
    parts = [f"{outcome['ms']:.2f} ms [{outcome['ms_20']:.2f}, {outcome['ms_80']:.2f}]"]
    if outcome["peak_bytes"] is not None:
        parts.append(f"peak {outcome['peak_bytes'] / GIB:.2f} GiB")
    for reference in ("sdpa", "official"):
        times = ratio(outcome, outcomes, reference)
        if times is not None and outcome is not outcomes[reference]:
            parts.append(f"{times:.3f} x {reference}")
    parts += [f"error {e:.1e}" for what, e in outcome["errors"].items() if what == "official"]
    return "; ".join(parts)
