"""Times whole models of timm with their own attention and with fbila's.

    python -m benchmarks.hosts --output hosts.json
    python -m benchmarks.hosts --only inference/eager --output hosts.json --resume

benchmarks/README.md says what is measured and how to read it.
"""

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from ..machine import describe
from ..results import Results
from ..turns import measure_subject
from ..unet.report import summary
from ..unet.timer import StepTimer
from .report import lines
from .rows import ROWS, TINY_ROWS, Row, select
from .step import make_step


def main(
    argv: list[str] | None = None,
    all_rows: Sequence[Row] = ROWS,
    tiny_rows: Sequence[Row] = TINY_ROWS,
) -> int:
    args = _parse(argv)
    rows = select(tiny_rows if args.device == "cpu" else all_rows, args.only)
    if not rows:
        raise SystemExit(f"No row's name begins with {' or '.join(args.only)}; see --list.")
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.hosts needs a CUDA device.")

    machine = {**describe(), "timm": version("timm"), "device": args.device}
    results = Results(machine, args.output, resume=args.resume)
    timer = StepTimer(args.device, args.seconds * 1e3)
    # tqdm's own line stays below what is written.
    for row in tqdm([row for row in rows if row.name not in results.cases]):
        record = measure_subject(row, timer, lambda row=row: make_step(row, args.device))
        results.add(row.name, record)
        tqdm.write("\n".join(lines(row.name, record)))
    print(summary(results.cases))
    return 1 if results.bad() else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=description)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PREFIX", help="of the names of rows")
    add("--list", action="store_true", help="print the names of the rows only")
    add("--output", type=Path, metavar="JSON", help="written after each row")
    add("--resume", action="store_true", help="keep what --output has already")
    add("--seconds", type=float, default=2.0, help="of repeats for each turn (%(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny models, to try it out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
