"""What a result depends on: the device, its driver, the versions, and which sources they are."""

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fbila


def describe() -> dict[str, str | None]:
    package = Path(fbila.__file__).parent
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "fbila": fbila.__version__,
        "revision": _output("git", "-C", str(package), "describe", "--always", "--dirty"),
        "sources": hash_of_sources([package, Path(__file__).parent]),
    }


def hash_of_sources(folders: Iterable[Path]) -> str:
    """Short sha256 of the Python files below `folders`, with their paths.

    It ties a result to a tree where there is no git, or where its revision is another's.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder.parent).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line a command prints; None where there is no such command or it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(result.stdout.strip().splitlines()), None)
