"""Times whole models of timm with their own attention and with fbila's.

    python -m benchmarks.hosts --output hosts.json
    python -m benchmarks.hosts --only inference/eager --output hosts.json --resume

benchmarks/README.md says what is measured and how to read it.
"""

from collections.abc import Sequence

from .. import command
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
    name: str = "benchmarks.hosts",
) -> int:
    args = command.parse(name, __doc__.splitlines()[0], argv)
    rows = select(tiny_rows if args.device == "cpu" else all_rows, args.only)
    timer = command.timer_of(args, StepTimer)

    def measure(row: Row) -> dict:
        return measure_subject(row, timer, lambda: make_step(row, args.device))

    return command.run(args, rows, "timm", measure, lines, summary)


if __name__ == "__main__":
    raise SystemExit(main())
