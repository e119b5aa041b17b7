"""Prints a result of benchmarks.unet as Markdown tables.

python -m benchmarks.unet.tables unet.json
"""

import argparse
from itertools import groupby
from pathlib import Path

from ..results import read
from .goals import GIB, WORDS
from .report import ratio, reason

HEAD = [
    "UNet", "px", "batch", "attention", "ms", "20 %", "80 %", "x sdpa", "x official", "peak GiB",
]  # fmt: skip
GOAL_HEAD = ["row", "goal", "limit", "value", "met"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unet.tables", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.unet")
    content = read(parser.parse_args(argv).result)
    print("\n".join(f"- {key}: {value}" for key, value in content["machine"].items()))
    cases = content["cases"]
    for group, records in groupby(cases.values(), lambda record: record["case"]["group"]):
        print(f"\n### {group}\n\n{table(list(records))}")
    print(f"\n### goals\n\n{goal_table(cases)}")


def table(records: list[dict]) -> str:
    """A row for each attention; one without a time has a row that says why."""
    rows = []
    for record in records:
        case = record["case"]
        start = [case["unet"], str(case["px"]), str(case["batch"])]
        outcomes = record.get("attentions")
        if outcomes is None:
            rows.append(_filled([*start, "", f"{record['status']}: {record['reason']}"]))
        for name, outcome in (outcomes or {}).items():
            rows.append(_filled([*start, name, *_numbers(outcome, outcomes)]))
    return _markdown(HEAD, rows)


def goal_table(cases: dict[str, dict]) -> str:
    rows = [
        [name, goal["goal"], *_amounts(goal), _met(goal["over"])]
        for name, record in cases.items()
        for goal in record.get("goals", ())
    ]
    return _markdown(GOAL_HEAD, rows)


def _numbers(outcome: dict, outcomes: dict) -> list[str]:
    words = reason(outcome)
    if words is not None:
        return [words]
    peak = outcome["peak_bytes"]
    return [
        *(f"{outcome[key]:.2f}" for key in ("ms", "ms_20", "ms_80")),
        *(_number(ratio(outcome, outcomes, name), ".3f") for name in ("sdpa", "official")),
        _number(None if peak is None else peak / GIB, ".2f"),
    ]


def _amounts(goal: dict) -> list[str]:
    _, unit, scale = WORDS[goal["quantity"]]
    values = (goal["limit"], goal["value"])
    return ["" if x is None else f"{x / scale:.2f} {unit}" for x in values]


def _met(over: float | None) -> str:
    if over is None:
        return "not measured"
    return "yes" if over <= 0 else f"{over:.1%} over"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _filled(row: list[str]) -> list[str]:
    return row + [""] * (len(HEAD) - len(row))


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
