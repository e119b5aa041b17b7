"""The JSON of a run, written after each case, so that an interrupted run keeps what it has."""

import json
from collections.abc import Sequence
from pathlib import Path


class Results:
    """`{"machine": {...}, "cases": {name: record}}`, in a file where a path is given.

    With `resume`, the measured records that are in the file already are kept, if they are of the
    same machine and versions. Cases are written in the order of `names`, and others behind them.
    """

    def __init__(
        self,
        machine: dict,
        path: Path | None = None,
        *,
        resume: bool = False,
        names: Sequence[str] = (),
    ):
        self.path = path
        self.machine = machine
        self.places = {name: place for place, name in enumerate(names)}
        self.cases: dict[str, dict] = {}
        if resume and path is not None and path.exists():
            content = read(path)
            self._check_machine(content["machine"])
            self.cases = {
                name: record
                for name, record in content["cases"].items()
                if record["status"] == "measured"
            }

    def add(self, name: str, record: dict) -> None:
        self.cases[name] = record
        last = len(self.places)
        self.cases = dict(sorted(self.cases.items(), key=lambda x: self.places.get(x[0], last)))
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: an interrupted write leaves the file as it was.
        partial = self.path.with_name(self.path.name + ".partial")
        content = {"machine": self.machine, "cases": self.cases}
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self.path)

    def bad(self) -> list[str]:
        """The names of the cases that are wrong or failed."""
        return [
            name for name, record in self.cases.items() if record["status"] in ("wrong", "failed")
        ]

    def _check_machine(self, found: dict) -> None:
        for key, value in self.machine.items():
            if found.get(key) != value:
                raise SystemExit(
                    f"{self.path} was measured with {key} {found.get(key)}, this is {value}: "
                    "start another file."
                )


def read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error
    if "machine" not in content or "cases" not in content:
        raise SystemExit(f"{path} is no result of these benchmarks.")
    return content
