"""The command: what it runs, writes and resumes, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stand_ins import MACHINE, FakeTimer

import fbila
from benchmarks import ops
from benchmarks.results import Results, read

ROOT = Path(__file__).parents[2]


@pytest.fixture
def device(monkeypatch, registry):
    """Pretends that there is a GPU, with a timer that knows the time."""
    timer = FakeTimer()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "describe", lambda: MACHINE)
    monkeypatch.setattr(ops, "make_timer", lambda quick: timer)
    return timer


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    command = [sys.executable, "-m", "benchmarks.ops"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "benchmarks.ops needs a CUDA device."
    assert "Traceback" not in ended.stderr


def test_list(registry, capsys):
    assert ops.main(["--list", "--group", "large", "host"]) == 0
    assert capsys.readouterr().out.split() == [registry[0].name, registry[2].name]


def test_no_such_case(registry):
    with pytest.raises(SystemExit, match="No case of any group has 'nothing' in its name"):
        ops.main(["--case", "nothing"])


def test_run(device, registry, tmp_path, capsys):
    path = tmp_path / "folder" / "result.json"
    assert ops.main(["--output", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["machine"] == {**MACHINE, "base": None}
    assert list(content["cases"]) == [case.name for case in registry]
    assert "eager" in content["cases"][registry[1].name]["passes"]["forward"]["peers"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7  # two passes of three cases, and the summary
    assert printed[-1] == "3 measured; 0 of 2 targets met"
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_quick_leaves_out_peers_without_a_target(device, registry, tmp_path):
    path = tmp_path / "result.json"
    ops.main(["--quick", "--output", str(path)])
    assert read(path)["cases"][registry[1].name]["passes"]["forward"]["peers"] == {}


def test_interrupted_and_resumed(device, registry, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    measure, done = ops.measure, []

    def interrupted(case, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(case.name)
        return measure(case, *rest)

    monkeypatch.setattr(ops, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ops.main(["--output", str(path)])
    assert list(read(path)["cases"]) == [case.name for case in registry[:2]]

    monkeypatch.setattr(
        ops, "measure", lambda case, *rest: done.append(case.name) or measure(case, *rest)
    )
    assert ops.main(["--output", str(path), "--resume"]) == 0
    assert done == [case.name for case in registry]
    assert list(read(path)["cases"]) == done


def test_resume_measures_again_what_was_not_measured(tmp_path):
    path = tmp_path / "result.json"
    first = Results(MACHINE, path)
    for status in ("measured", "skipped", "wrong", "failed"):
        first.add(status, {"status": status})
    assert list(Results(MACHINE, path, resume=True).cases) == ["measured"]
    assert list(Results(MACHINE, path).cases) == []


def test_resume_refuses_another_machine(tmp_path):
    path = tmp_path / "result.json"
    Results(MACHINE, path).add("name", {"status": "measured"})
    with pytest.raises(SystemExit, match="measured with torch 2, this is 9: start another file"):
        Results(MACHINE | {"torch": "9"}, path, resume=True)


@pytest.mark.parametrize("text", ["{", '{"rows": []}'])
def test_resume_refuses_another_file(text, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"result\.json"):
        Results(MACHINE, path, resume=True)


def test_a_wrong_result_ends_in_status_1(device, registry, tmp_path, monkeypatch, capsys):
    linear_attn = fbila.linear_attn

    def wrong(q, k, v, *, impl=None, **options):
        o = linear_attn(q, k, v, impl=impl, **options)
        return 1.01 * o if q.shape[-1] == 8 and impl is None else o

    monkeypatch.setattr(fbila, "linear_attn", wrong)
    path = tmp_path / "result.json"
    assert ops.main(["--output", str(path)]) == 1
    content = read(path)["cases"]
    assert [record["status"] for record in content.values()] == ["measured", "wrong", "measured"]
    assert "2 measured, 1 wrong" in capsys.readouterr().out
