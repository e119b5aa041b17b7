"""Times a denoising step of whole UNets with softmax, official LinFusion and fbila's attention.

    python -m benchmarks.unet --output unet.json
    python -m benchmarks.unet --only eager compiled/sd15 --output unet.json --resume

benchmarks/README.md says what is measured and how to read it.
"""

from diffusers.utils import logging

from .. import command
from .gate import Gate
from .measure import measure
from .report import lines, summary
from .rows import ROWS, TINY_ROWS, select
from .timer import StepTimer


def main(argv: list[str] | None = None) -> int:
    args = command.parse("benchmarks.unet", __doc__.splitlines()[0], argv)
    rows = select(TINY_ROWS if args.device == "cpu" else ROWS, args.only)
    # diffusers warns that a UNet in float16 has no layers to be kept in float32.
    logging.set_verbosity_error()
    timer, gate = command.timer_of(args, StepTimer), Gate()
    return command.run(
        args, rows, "diffusers", lambda row: measure(row, timer, gate), lines, summary
    )


if __name__ == "__main__":
    raise SystemExit(main())
