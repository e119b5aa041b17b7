"""The command line of benchmarks of whole models: rows chosen by name, measured one by one."""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .apart import TURNS, WaitingTimer, alone, answer, measure_apart
from .machine import describe
from .results import Results


def parse(name: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of `python -m name`."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PREFIX", help="of the names of rows")
    add("--list", action="store_true", help="print the names of the rows only")
    add("--output", type=Path, metavar="JSON", help="written after each row")
    add("--resume", action="store_true", help="keep what --output has already")
    add("--seconds", type=float, default=2.0, help="of repeats for each round (%(default)s)")
    add("--apart", action="store_true", help="compile all ways in processes, side by side")
    add("--processes", type=int, default=12, help="at a time, with --apart (%(default)s)")
    add("--way", help=argparse.SUPPRESS)
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny models, to try it out")
    args = parser.parse_args(argv)
    args.name = name
    args.answers = alone() if args.way else None
    return args


def timer_of(args: argparse.Namespace, kind: type) -> Any:
    """A timer of this kind with the budget that was asked for."""
    turns = TURNS if args.way else 1
    timer = kind(args.device, args.seconds * 1e3 / turns)
    return WaitingTimer(timer, args.answers) if args.way else timer


def run(
    args: argparse.Namespace,
    rows: Sequence[Any],
    library: str,
    measure: Callable[[Any], dict],
    lines: Callable[[str, dict], list[str]],
    summary: Callable[[Mapping[str, dict]], str],
) -> int:
    """Lists or measures the rows; the exit status: 1 where one is wrong or failed.

    library: Whose models they are; its version goes into the result.
    """
    if not rows:
        raise SystemExit(f"No row's name begins with {' or '.join(args.only)}; see --list.")
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{args.name} needs a CUDA device.")
    if args.way:
        (row,) = (row for row in rows if row.name == args.only[0])
        answer(args.way, row, measure, args.answers)
        # What was compiled takes seconds to be torn down, for which the others would wait.
        os._exit(0)
    machine = {**describe(), library: version(library), "device": args.device}
    names = [row.name for row in rows]
    results = Results(machine, args.output, resume=args.resume, names=names)
    pending = [row for row in rows if row.name not in results.cases]
    apart = [row for row in pending if args.apart and row.mode != "eager"]

    def records() -> Iterator[tuple[Any, dict]]:
        yield from ((row, measure(row)) for row in pending if row not in apart)
        yield from measure_apart(apart, args)

    # tqdm's own line stays below what is written.
    for row, record in tqdm(records(), total=len(pending)):
        # Rows of several runs may come to be in one file.
        results.add(row.name, record | {"sources": machine["sources"]})
        tqdm.write("\n".join(lines(row.name, record)))
    print(summary(results.cases))
    return 1 if results.bad() else 0
