"""`--base`: another fbila is unpacked beside these benchmarks and measured in turns with ours."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stand_ins import MACHINE

from benchmarks import compare, ops
from benchmarks.report import lines
from benchmarks.results import read

ROOT = Path(__file__).parents[2]
GIT = shutil.which("git") and (ROOT / ".git").exists()

# Answers as benchmarks.worker does, without measuring; it writes down who was asked, and when.
FAKE_WORKER = """
import json, sys
from pathlib import Path
import fbila
print(json.dumps({"package": str(Path(fbila.__file__).parent)}), flush=True)
for line in sys.stdin:
    with open(fbila.LOG, "a") as log:
        log.write(fbila.NAME + "\\n")
    status = {"status": "skipped", "reason": "not there"}
    row = {"ms": fbila.MS, "ms_20": fbila.MS, "ms_80": fbila.MS, "peers": {}}
    measured = {"status": "measured", "passes": {"forward": row}}
    print(json.dumps(measured if line.strip() in fbila.CASES else status), flush=True)
"""


def build(folder, name, ms, cases, log):
    """A folder with an fbila that takes `ms` and knows `cases`."""
    (folder / "fbila").mkdir(parents=True)
    (folder / "fbila" / "__init__.py").write_text(
        f"NAME, MS, CASES, LOG = {name!r}, {ms}, {cases}, {str(log)!r}\n"
    )
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "__init__.py").write_text("")
    (folder / "benchmarks" / "worker.py").write_text(FAKE_WORKER)
    return folder


@pytest.fixture
def two(tmp_path, monkeypatch):
    """This repository and a base, both made up."""
    log = tmp_path / "log"
    ours = build(tmp_path / "ours", "ours", 0.5, ["a", "only ours"], log)
    base = build(tmp_path / "base", "base", 2.0, ["a", "only theirs"], log)
    monkeypatch.setattr(compare, "ROOT", ours)
    return base, log


def test_turns_and_ratio(two):
    base, log = two
    with compare.workers(str(base)) as pair:
        record = compare.compare("a", *pair)
    assert log.read_text().split() == ["base", "ours"] * 2
    found = record["passes"]["forward"]["base"]
    assert found == {"ms": [0.5, 0.5], "base_ms": [2.0, 2.0], "ratio": 0.25}
    (line,) = lines("a", record)
    assert "0.250 x the time of the base (0.250, 0.250)" in line


def test_a_case_that_one_side_does_not_have(two):
    with compare.workers(str(two[0])) as pair:
        ours = compare.compare("only ours", *pair)
        assert ours["base"] == {"status": "skipped", "reason": "not there"}
        assert lines("x", ours)[-1] == "x  base skipped: not there"
        assert compare.compare("only theirs", *pair)["status"] == "skipped"


def test_processes_end(two):
    with compare.workers(str(two[0])) as pair:
        pass
    assert [worker.process.returncode for worker in pair] == [0, 0]


def test_a_worker_that_dies_is_an_error(two):
    (two[0] / "fbila" / "__init__.py").write_text("raise SystemExit(3)")
    with (
        pytest.raises(SystemExit, match="A worker ended with status 3"),
        compare.workers(str(two[0])),
    ):
        pass


def test_the_whole_command(two, registry, monkeypatch, tmp_path, capsys):
    base, _ = two
    for folder in (base, compare.ROOT):
        text = (folder / "fbila" / "__init__.py").read_text()
        names = [case.name for case in registry]
        (folder / "fbila" / "__init__.py").write_text(f"{text}CASES = {names}\n")
    monkeypatch.setattr(ops.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "describe", lambda: MACHINE)
    output = tmp_path / "result.json"
    assert ops.main(["--base", str(base), "--output", str(output)]) == 0
    assert capsys.readouterr().out.count("0.250 x the time of the base") == len(registry)
    assert read(output)["machine"]["base"] == str(base)


@pytest.mark.skipif(not GIT, reason="needs the git repository")
class TestUnpack:
    def test_revision(self, tmp_path):
        compare.unpack("HEAD", tmp_path)
        code = "import benchmarks.worker, fbila; print(fbila.__file__, benchmarks.__file__)"
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ended.stdout.split() == [
            str(tmp_path / package / "__init__.py") for package in ("fbila", "benchmarks")
        ], ended.stderr

    def test_no_such_revision(self, tmp_path):
        with pytest.raises(SystemExit, match="--base nothing: no such revision") as error:
            compare.unpack("nothing", tmp_path)
        assert "\n" not in str(error.value)


def test_unpack_folder(two, tmp_path):
    compare.unpack(str(two[0]), tmp_path / "copy")
    assert "base" in (tmp_path / "copy" / "fbila" / "__init__.py").read_text()
    assert (tmp_path / "copy" / "benchmarks" / "worker.py").exists()
