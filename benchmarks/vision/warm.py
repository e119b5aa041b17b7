"""Compiles what benchmarks.vision will measure, several rows at a time; their times mean nothing.

    python -m benchmarks.vision.warm --jobs 8
    python -m benchmarks.vision --output vision.json

Compilers work on the CPU for minutes, during which the GPU waits. They find what was compiled
before in their caches on the disk. What does not fit into memory together is compiled all the same.
"""

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from .rows import ROWS, Row, select


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision.warm", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="PREFIX", help="of names of rows")
    parser.add_argument("--jobs", type=int, default=8, help="rows at a time (%(default)s)")
    args = parser.parse_args(argv)
    groups = by_process(select(ROWS, args.only))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        outputs = [Path(folder) / f"{number}.json" for number in range(len(groups))]
        done = pool.map(compile_rows, groups, outputs)
        failed = [words for words in tqdm(done, total=len(groups)) if words]
    print("\n".join(failed) or "all rows are compiled")


def by_process(rows: list[Row]) -> list[list[str]]:
    """Names of rows, slow ones first; those of a layer go together, since they compile soon."""
    models = [row for row in rows if row.part == "models"]
    models.sort(key=lambda row: row.kind != "training")
    of_layer: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.part == "layers":
            of_layer.setdefault((row.host, row.kind), []).append(row.name)
    return [[row.name] for row in models] + list(of_layer.values())


def compile_rows(names: list[str], output: Path) -> str:
    """What went wrong, if anything did."""
    command = [sys.executable, "-m", "benchmarks.vision", "--seconds", "0", "--output", str(output)]
    ended = subprocess.run([*command, "--only", *names], capture_output=True, text=True)
    if ended.returncode == 0:
        return ""
    last = (ended.stdout + ended.stderr).strip().splitlines()[-1:]
    return f"{' '.join(names)}: {' '.join(last)}"


if __name__ == "__main__":
    main()
