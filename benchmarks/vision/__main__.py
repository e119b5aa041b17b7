"""Times vision models and their layers by fbila's kernels and by the official operations.

    python -m benchmarks.vision --output vision.json
    python -m benchmarks.vision --only layers --output vision.json --resume

benchmarks/README.md says what is measured and how to read it.
"""

from .. import command
from ..hosts.report import lines
from ..turns import measure_subject
from ..unet.report import summary
from ..unet.timer import StepTimer
from .rows import ROWS, TINY_ROWS, Row, select
from .step import make_step
from .timer import GraphTimer


def main(argv: list[str] | None = None) -> int:
    args = command.parse("benchmarks.vision", __doc__.splitlines()[0], argv)
    rows = select(TINY_ROWS if args.device == "cpu" else ROWS, args.only)
    timers = {"models": StepTimer, "graphs": StepTimer, "layers": GraphTimer}
    timers = {part: command.timer_of(args, kind) for part, kind in timers.items()}

    def measure(row: Row) -> dict:
        return measure_subject(row, timers[row.part], lambda: make_step(row, args.device))

    return command.run(args, rows, "timm", measure, lines, summary)


if __name__ == "__main__":
    raise SystemExit(main())
