"""Times fbila's operators against the bytes they must move, and against their peers, on one GPU.

    python -m benchmarks.ops --output results.json
    python -m benchmarks.ops --group large --case 16x64 --base HEAD~3

benchmarks/README.md says what is measured and how to read it.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from .cases import GROUPS, Case, select
from .compare import compare, workers
from .machine import describe
from .measure import measure
from .report import lines, summary
from .results import Results
from .timing import make_timer


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    cases = select(args.group, args.case)
    if not cases:
        raise SystemExit(f"No case of {args.group or 'any group'} has {args.case!r} in its name.")
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.ops needs a CUDA device.")

    results = Results({**describe(), "base": args.base}, args.output, resume=args.resume)
    with _measuring(args) as measure_case:
        # tqdm's own line stays below what is written.
        for case in tqdm([case for case in cases if case.name not in results.cases]):
            record = measure_case(case)
            results.add(case.name, record)
            tqdm.write("\n".join(lines(case.name, record)))
    print(summary(results.cases))
    return 1 if results.bad() else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=_first_line())
    parser.add_argument("--group", nargs="+", choices=GROUPS, help="default: all")
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="of the names of cases")
    parser.add_argument("--list", action="store_true", help="print the names of the cases only")
    parser.add_argument("--output", type=Path, metavar="JSON", help="written after each case")
    parser.add_argument("--resume", action="store_true", help="keep what --output has already")
    parser.add_argument(
        "--base", metavar="REV", help="a git revision, or a folder with fbila, to compare with"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats, and only the peers of the targets"
    )
    return parser.parse_args(argv)


def _first_line() -> str:
    return __doc__.splitlines()[0]


@contextmanager
def _measuring(args: argparse.Namespace) -> Iterator[Callable[[Case], dict]]:
    if args.base:
        quick = ["--quick"] if args.quick else []
        with workers(args.base, *quick) as (ours, theirs):
            yield lambda case: compare(case.name, ours, theirs)
    else:
        timer = make_timer(args.quick)
        with timer.stream():
            yield lambda case: measure(case, timer, case.target_peers if args.quick else case.peers)


if __name__ == "__main__":
    raise SystemExit(main())
