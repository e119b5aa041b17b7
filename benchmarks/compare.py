"""Another revision's fbila beside this one: two processes on one device, taking turns."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
ROUNDS = 2


class Worker:
    """`benchmarks.worker` with the packages fbila and benchmarks of `folder`."""

    def __init__(self, folder: Path, *arguments: str):
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        package = Path(self._answer()["package"]).resolve()
        if package != (folder / "fbila").resolve():
            self.close()
            raise SystemExit(f"The worker in {folder} would measure {package}.")

    def measure(self, name: str) -> dict:
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A worker ended with status {self.process.wait()}; see above.")
        return json.loads(line)


@contextmanager
def workers(base: str, *arguments: str) -> Iterator[tuple[Worker, Worker]]:
    """Workers for this fbila and for that of `base`, a git revision or a folder that has one."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(base, Path(folder))
        ours = Worker(ROOT, *arguments)
        try:
            theirs = Worker(Path(folder), *arguments)
            try:
                yield ours, theirs
            finally:
                theirs.close()
        finally:
            ours.close()


def unpack(base: str, folder: Path) -> None:
    """Into `folder`: fbila as of `base`, and these benchmarks, so that both are measured alike."""
    if (Path(base) / "fbila").is_dir():
        shutil.copytree(Path(base) / "fbila", folder / "fbila")
    else:
        command = ["git", "-C", str(ROOT), "archive", base, "fbila"]
        result = subprocess.run(command, capture_output=True)
        if result.returncode:
            words = result.stderr.decode().strip().splitlines()[-1]
            raise SystemExit(f"--base {base}: no such revision or folder with fbila ({words}).")
        with tarfile.open(fileobj=io.BytesIO(result.stdout)) as archive:
            archive.extractall(folder, filter="data")
    ignored = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=ignored)


def compare(name: str, ours: Worker, theirs: Worker) -> dict:
    """Our record of the case; each pass also has "base": the times of both, by round."""
    rounds = [(theirs.measure(name), ours.measure(name)) for _ in range(ROUNDS)]
    for base, record in rounds:
        if record["status"] != "measured":
            return record
        if base["status"] != "measured":
            return record | {"base": {key: base[key] for key in ("status", "reason")}}
    record = rounds[-1][1]
    for kind, row in record["passes"].items():
        base_ms, ms = (
            [x["passes"][kind]["ms"] for x in side] for side in zip(*rounds, strict=True)
        )
        row["base"] = {"ms": ms, "base_ms": base_ms, "ratio": median(ms) / median(base_ms)}
    return record
