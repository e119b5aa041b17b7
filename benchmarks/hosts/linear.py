"""Times models that are linear already as they come, and by fbila's kernels.

    python -m benchmarks.hosts.linear --output linear.json

The options are those of benchmarks.hosts.
"""

from .__main__ import main as run
from .linear_rows import LINEAR_ROWS, TINY_LINEAR_ROWS


def main(argv: list[str] | None = None) -> int:
    return run(argv, LINEAR_ROWS, TINY_LINEAR_ROWS, "benchmarks.hosts.linear")


if __name__ == "__main__":
    raise SystemExit(main())
