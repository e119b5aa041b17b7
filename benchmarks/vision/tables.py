"""Prints a result of benchmarks.vision as Markdown tables.

python -m benchmarks.vision.tables vision.json
"""

import argparse
from itertools import groupby
from pathlib import Path

from ..results import read
from ..unet.goals import GIB
from ..unet.report import reason
from ..unet.tables import goal_table
from .models import HOSTS

HEAD = ["", "size", "batch", "way", "ms", "20 %", "80 %", "eager / this", "compiled / this",
        "peak GiB", "of eager's"]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision.tables", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.vision")
    content = read(parser.parse_args(argv).result)
    print("\n".join(f"- {key}: {value}" for key, value in content["machine"].items()))
    cases = content["cases"]
    groups = groupby(cases.values(), lambda r: f"{r['case']['part']}, {r['case']['kind']}")
    for group, records in groups:
        print(f"\n### {group}\n\n{table(list(records))}")
    print(f"\n### goals\n\n{goal_table(cases)}")


def table(records: list[dict]) -> str:
    """A row for each way; times as often as this one goes into another are above 1 if faster."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for record in records:
        case = record["case"]
        start = [HOSTS[case["host"]].title, size(case), str(case["batch"])]
        outcomes = record.get("attentions")
        if outcomes is None:
            rows.append([*start, "", f"{record['status']}: {record['reason']}"])
            continue
        rows += [[*start, way, *_numbers(o, outcomes)] for way, o in outcomes.items()]
    return "\n".join(f"| {' | '.join(row + [''] * (len(HEAD) - len(row)))} |" for row in rows)


def size(case: dict) -> str:
    return f"{case['px'] ** 2} tokens" if case["part"] == "layers" else f"{case['px']} px"


def gain(outcome: dict, outcomes: dict, reference: str, key: str = "ms") -> float | None:
    """How often its time, or what `key` says, goes into that of the reference."""
    value, base = outcome.get(key), outcomes.get(reference, {}).get(key)
    return None if not value or not base else base / value


def _numbers(outcome: dict, outcomes: dict) -> list[str]:
    words = reason(outcome)
    if words is not None:
        return [words]
    times = [gain(outcome, outcomes, name) for name in ("eager", "compiled")]
    peak, lighter = outcome["peak_bytes"], gain(outcome, outcomes, "eager", "peak_bytes")
    return [
        *(f"{outcome[key]:.3f}" for key in ("ms", "ms_20", "ms_80")),
        *("" if times is None else f"{times:.2f}" for times in times),
        "" if peak is None else f"{peak / GIB:.2f}",
        "" if lighter is None else f"{1 / lighter:.2f}",
    ]


if __name__ == "__main__":
    main()
