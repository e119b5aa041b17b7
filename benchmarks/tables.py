"""Prints a result as the Markdown tables of docs/benchmarks.md.

python -m benchmarks.tables results.json
"""

import argparse
from itertools import groupby
from pathlib import Path

from .results import read

HEAD = ["B, N, H, D", "dtype", "layout", "pass", "ms", "floor ms", "of floor", "peak MiB"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.ops")
    content = read(parser.parse_args(argv).result)
    print("\n".join(f"- {key}: {value}" for key, value in content["machine"].items()))
    for group, records in groupby(
        content["cases"].values(), lambda record: record["case"]["group"]
    ):
        print(f"\n### {group}\n\n{table(list(records))}")


def table(records: list[dict]) -> str:
    """A row for each pass; a case without times has a row that says why."""
    peers = list(
        dict.fromkeys(
            name
            for record in records
            for row in record.get("passes", {}).values()
            for name in row["peers"]
        )
    )
    head = [*HEAD, *(f"{name} ms" for name in peers), "target ms", "met"]
    rows = [head, ["---"] * len(head)]
    for record in records:
        case = record["case"]
        name = ", ".join(str(case[key]) for key in "BNHD")
        what = [part for part in (case["option"], name) if part]
        start = [" ".join(what), case["dtype"], case["layout"].replace("_", "-")]
        if record["status"] != "measured":
            rows.append(
                [*start, f"{record['status']}: {record['reason']}", *[""] * (len(head) - 4)]
            )
        for kind, row in record.get("passes", {}).items():
            rows.append([*start, kind, *_times(row), *_peers(row, peers), *_verdict(row)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _times(row: dict) -> list[str]:
    peak = row.get("peak_bytes")
    return [
        _number(row["ms"], ".4f"),
        _number(row.get("floor_ms"), ".4f"),
        _number(row.get("floor_fraction"), ".2f"),
        _number(None if peak is None else peak / 2**20, ".1f"),
    ]


def _peers(row: dict, names: list[str]) -> list[str]:
    return [_number(row["peers"].get(name, {}).get("ms"), ".4f") for name in names]


def _verdict(row: dict) -> list[str]:
    over = row.get("over")
    if over is None:
        return ["", ""]
    return [_number(row["limit_ms"], ".4f"), "yes" if over <= 0 else f"{over:.1%} over"]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
