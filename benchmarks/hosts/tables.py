"""Prints a result of benchmarks.hosts as Markdown tables.

python -m benchmarks.hosts.tables hosts.json
"""

import argparse
from itertools import groupby
from pathlib import Path

from ..results import read
from ..unet.goals import GIB
from ..unet.report import reason
from ..unet.tables import goal_table
from .report import throughput

HEAD = ["model", "px", "batch", "attention", "images/s", "ms", "20 %", "80 %", "x", "peak GiB"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts.tables", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.hosts")
    content = read(parser.parse_args(argv).result)
    print("\n".join(f"- {key}: {value}" for key, value in content["machine"].items()))
    cases = content["cases"]
    groups = groupby(cases.values(), lambda r: f"{r['case']['kind']}, {r['case']['mode']}")
    for group, records in groups:
        print(f"\n### {group}\n\n{table(list(records))}")
    print(f"\n### goals\n\n{goal_table(cases)}")


def table(records: list[dict]) -> str:
    """A row for each attention; "x" is its throughput over that of the first one."""
    rows = [HEAD, ["---"] * len(HEAD)]
    for record in records:
        case = record["case"]
        start = [case["host"], str(case["px"]), str(case["batch"])]
        outcomes = record.get("attentions")
        if outcomes is None:
            rows.append([*start, "", f"{record['status']}: {record['reason']}"])
            continue
        first = throughput(next(iter(outcomes.values())), record)
        rows += [[*start, what, *_numbers(o, record, first)] for what, o in outcomes.items()]
    return "\n".join(f"| {' | '.join(row + [''] * (len(HEAD) - len(row)))} |" for row in rows)


def _numbers(outcome: dict, record: dict, first: float | None) -> list[str]:
    words = reason(outcome)
    if words is not None:
        return [words]
    rate, peak = throughput(outcome, record), outcome["peak_bytes"]
    return [
        f"{rate:.1f}",
        *(f"{outcome[key]:.2f}" for key in ("ms", "ms_20", "ms_80")),
        "" if first is None else f"{rate / first:.2f}",
        "" if peak is None else f"{peak / GIB:.2f}",
    ]


if __name__ == "__main__":
    main()
