"""Prints a result of benchmarks.hosts as Markdown tables.

python -m benchmarks.hosts.tables hosts.json
"""

import argparse
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from ..results import read
from ..unet.goals import GIB
from ..unet.report import reason
from ..unet.tables import goal_table
from .models import HOSTS
from .plot import ATTENTIONS, by_panel
from .report import throughput

HEAD = ["model", "px", "batch", "attention", "images/s", "ms", "20 %", "80 %", "x", "peak GiB"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts.tables", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.hosts")
    content = read(parser.parse_args(argv).result)
    print("\n".join(f"- {key}: {value}" for key, value in content["machine"].items()))
    cases = content["cases"]
    for group, records in groupby(cases.values(), _group):
        print(f"\n### {group}\n\n{table(list(records))}")
    found = crossovers(content)
    if found:
        print("\n### where linear attention wins\n\n" + "\n".join(f"- {line}" for line in found))
    print(f"\n### goals\n\n{goal_table(cases)}")


def _group(record: dict) -> str:
    case = record["case"]
    return f"{case['kind']}, {case['mode']}, {case['dtype']}"


def crossovers(content: dict) -> list[str]:
    """For each model, pass and mode, from which side of the pictures on linear is the faster."""
    lines = []
    for (host, kind), records in by_panel(content).items():
        for mode in dict.fromkeys(record["case"]["mode"] for record in records):
            gains = {
                record["case"]["px"]: gain
                for record in records
                if record["case"]["mode"] == mode and (gain := _gain(record)) is not None
            }
            if gains:
                lines.append(f"{HOSTS[host].title}, {kind}, {mode}: {crossover(gains)}")
    return lines


def crossover(gains: Mapping[int, float]) -> str:
    """In words, given how many times the throughput of softmax linear has at each side."""
    losing = [px for px, gain in gains.items() if gain <= 1]
    winning = [px for px in gains if not losing or px > max(losing)]
    words = f"from {min(winning)} px on" if winning else "at no side measured"
    measured = ", ".join(f"{gain:.2f} at {px}" for px, gain in sorted(gains.items()))
    return f"{words} ({measured})"


def _gain(record: dict) -> float | None:
    rates = [throughput(record["attentions"].get(name, {}), record) for name in ATTENTIONS]
    return None if None in rates else rates[1] / rates[0]


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
