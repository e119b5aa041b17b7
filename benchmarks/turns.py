"""One row: each attention in turns, gated, timed and weighed. The record goes into JSON."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Protocol

import torch

from .nearness import Wrong
from .peers import Absent
from .timing import Call, quantiles
from .unet.goals import Goal
from .unet.timer import StepTimer
from .upkeep import first_line, free

# What ends an attention's part in a row, and the row's own status with it.
BAD = ("wrong", "failed")


class Row(Protocol):
    """What `measure_subject` needs to know of a row, which is a dataclass.

    Attributes:
        attentions: The ways to compute attention that take turns.
        skipped: Why others do not, by name.
        rounds: How many turns each takes.
        weighed: Whether peak memory is measured.
        goals: What is good enough.
    """

    @property
    def attentions(self) -> tuple[str, ...]: ...
    @property
    def skipped(self) -> Mapping[str, str]: ...
    @property
    def rounds(self) -> int: ...
    @property
    def weighed(self) -> bool: ...
    @property
    def goals(self) -> tuple[Goal, ...]: ...


class Subject(Protocol):
    """What a row is measured on.

    Attributes:
        missing: Why what others are compared with at the size of the row is not there, if it is
            not.
    """

    missing: str | None

    def ready(self, name: str) -> AbstractContextManager[tuple[Call, dict[str, float]]]: ...


def measure_subject(row: Any, timer: StepTimer, make: Callable[[], Subject]) -> dict:
    """The record of `row`; its "status" is "measured", or what went wrong for one or for all.

    "attentions" has by name what was measured, or why not: "skipped", "absent", "out_of_memory",
    "wrong" or "failed", with words. No more than one of them fails with it.
    """
    try:
        subject = make()
        return record_of(row, _take_turns(row, subject, timer), subject.missing)
    except Exception as error:
        traceback.print_exc()
        return {"case": asdict(row), "status": "failed", "reason": first_line(error)}
    finally:
        free()


def record_of(row: Any, outcomes: dict[str, dict], missing: str | None) -> dict:
    """The record of `row` with these outcomes by way."""
    record = {"case": asdict(row), "status": "measured"}
    if missing:
        record["missing_reference"] = missing
    for status in BAD:
        reasons = [f"{name}: {o[status]}" for name, o in outcomes.items() if status in o]
        if reasons:
            record |= {"status": status, "reason": "; ".join(reasons)}
    goals = [goal.verdict(outcomes) for goal in row.goals]
    return record | {"attentions": outcomes, "goals": goals}


def _take_turns(row: Row, subject: Subject, timer: StepTimer) -> dict[str, dict]:
    outcomes: dict[str, dict] = {name: {"skipped": why} for name, why in row.skipped.items()}
    for _ in range(row.rounds):
        for name in row.attentions:
            outcomes[name] = _turn(row, name, subject, timer, outcomes.get(name))
            free()
    return {name: _summarised(outcome) for name, outcome in outcomes.items()}


def _turn(row: Row, name: str, subject: Subject, timer: StepTimer, earlier: dict | None) -> dict:
    """The outcome of another turn, with the times of earlier ones; a failure is final."""
    if earlier is not None and "times" not in earlier:
        return earlier
    try:
        with subject.ready(name) as (call, errors):
            times = timer.times(call)
            if earlier is not None:
                return earlier | {"times": [*earlier["times"], times]}
            peak_bytes = timer.peak_bytes(call) if row.weighed else None
            return {"times": [times], "peak_bytes": peak_bytes, "errors": errors}
    except Absent as reason:
        return {"absent": str(reason)}
    except Wrong as reason:
        return {"wrong": str(reason)}
    except Exception as error:
        if _out_of_memory(error):
            return {"out_of_memory": first_line(error)}
        traceback.print_exc()
        return {"failed": first_line(error)}


def _out_of_memory(error: BaseException) -> bool:
    """Also where a compiler has wrapped it."""
    return any(isinstance(e, torch.OutOfMemoryError) for e in _chain(error)) or (
        "out of memory" in str(error).lower()
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _summarised(outcome: dict) -> dict:
    """Quantiles over all turns, and the median of each turn, in place of the times."""
    if "times" not in outcome:
        return outcome
    turns = outcome["times"]
    times = quantiles([ms for turn in turns for ms in turn])
    by_turn = [quantiles(turn).ms for turn in turns]
    rest = {key: value for key, value in outcome.items() if key != "times"}
    return {**times._asdict(), "by_turn": by_turn, "repeats": sum(map(len, turns)), **rest}
