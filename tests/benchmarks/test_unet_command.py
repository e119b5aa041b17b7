"""The command on a CPU: a tiny UNet goes all the way into JSON, tables and a plot."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import turns
from benchmarks.nearness import Wrong
from benchmarks.peers import Absent
from benchmarks.results import read
from benchmarks.unet import __main__ as command
from benchmarks.unet import attentions, inference, plot, rows, tables
from benchmarks.unet.gate import Gate
from benchmarks.unet.measure import measure
from benchmarks.unet.report import lines, summary
from benchmarks.unet.timer import FEWEST, MOST, StepTimer


def lighten(monkeypatch) -> None:
    """Without what would take long."""

    def missing(unet):
        raise Absent("not available: too slow for a test")

    monkeypatch.setattr(attentions, "low_memory", missing)
    # Traced, but run as it is: a C++ compiler would take a minute.
    monkeypatch.setitem(inference.COMPILE, "default", {"backend": "eager"})
    # Collecting garbage takes longer than a row.
    for module in (inference, turns):
        monkeypatch.setattr(module, "free", lambda: None)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    lighten(monkeypatch)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """All tiny rows, measured once."""
    path = tmp_path_factory.mktemp("unet") / "folder" / "unet.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        lighten(monkeypatch)
        assert run(path) == 0
    torch.compiler.reset()
    return path


def run(path, *arguments) -> int:
    return command.main(["--device", "cpu", "--seconds", "0", "--output", str(path), *arguments])


def tiny(name: str) -> rows.Row:
    return rows.select(rows.TINY_ROWS, [name])[0]


def measured(row, gate=None) -> dict:
    return measure(row, StepTimer("cpu", 0), gate or Gate())


def test_everything_is_in_the_file(result):
    content = read(result)
    assert content["machine"]["diffusers"]
    assert list(content["cases"]) == [row.name for row in rows.TINY_ROWS]
    for row, record in zip(rows.TINY_ROWS, content["cases"].values(), strict=True):
        assert record["status"] == "measured", record
        assert set(record["attentions"]) == {*row.attentions, *row.skipped}
        for name, outcome in record["attentions"].items():
            if name in row.skipped or name == "fbila low memory":
                continue
            assert 0 < outcome["ms_20"] <= outcome["ms"] <= outcome["ms_80"]
            assert len(outcome["by_turn"]) == row.rounds
            assert outcome["repeats"] == FEWEST * row.rounds
            assert bool(outcome["errors"]) == (name != "sdpa")
        assert [goal["goal"] for goal in record["goals"]] == [str(goal) for goal in row.goals]


def test_the_row_of_low_memory_is_kept_free(monkeypatch):
    record = measured(tiny("16k"))
    assert record["status"] == "measured"
    assert record["attentions"]["fbila low memory"] == {
        "absent": "not available: too slow for a test"
    }
    assert record["goals"][0]["over"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^benchmarks\.unet needs a CUDA device\.$"):
        command.main([])


def test_list(capsys):
    assert command.main(["--list", "--only", "train", "16k/eager"]) == 0
    names = capsys.readouterr().out.split()
    assert names == [
        "16k/eager/sd15/8192",
        "16k/eager/sd15/16384",
        *(f"train/{way}sd15/512" for way in ("", "graph/")),
    ]


def test_no_such_row():
    with pytest.raises(SystemExit, match="No row's name begins with nothing"):
        command.main(["--only", "nothing"])


def test_resume_keeps_rows(result, tmp_path, monkeypatch, capsys):
    content = read(result)
    kept = "eager/tiny/64"
    content["cases"] = {kept: content["cases"][kept], "train/tiny/64": {"status": "failed"}}
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(content))
    done = []

    def instead(row, *rest):
        done.append(row.name)
        return {"status": "measured", "attentions": {}, "goals": []}

    monkeypatch.setattr(command, "measure", instead)
    assert run(path, "--resume", "--only", "eager", "train") == 0
    assert done == ["eager/tiny/128", "train/tiny/64", "train/graph/tiny/64"]
    assert read(path)["cases"][kept] == content["cases"][kept]
    assert "4 measured" in capsys.readouterr().out


def failing(monkeypatch, name, error):
    """The attention `name` raises once it runs at the size of the row."""
    ready = inference.Inference.ready

    def instead(self, wanted):
        if wanted == name:
            raise error
        return ready(self, wanted)

    monkeypatch.setattr(inference.Inference, "ready", instead)


def wrapped() -> Exception:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("the compiler failed") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("9 GiB"), wrapped()])
def test_the_others_go_on_without_memory(error, monkeypatch):
    failing(monkeypatch, "official", error)
    record = measured(tiny("16k"))
    assert record["status"] == "measured"
    assert set(record["attentions"]["official"]) == {"out_of_memory"}
    assert record["attentions"]["fbila"]["ms"] > 0


@pytest.mark.parametrize(
    ("error", "status"), [(Wrong("errs by 2"), "wrong"), (ValueError("no"), "failed")]
)
def test_what_is_wrong_or_fails_has_no_time(error, status, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, "fbila fused blocks", error)
    path = tmp_path / "unet.json"
    assert run(path, "--only", "eager/tiny/64") == 1
    record = read(path)["cases"]["eager/tiny/64"]
    assert record["status"] == status
    assert set(record["attentions"]["fbila fused blocks"]) == {status}
    assert record["attentions"]["fbila"]["ms"] > 0
    assert record["goals"][0]["over"] is None
    assert f"1 {status}; 0 of 0 goals met, 1 not measured" in capsys.readouterr().out


def test_without_a_reference_the_smallest_size_decides(monkeypatch):
    step = inference.Inference._step

    def short_of_memory(self, unet):
        if not hasattr(self, "reference"):
            raise torch.OutOfMemoryError("9 GiB")
        return step(self, unet)

    monkeypatch.setattr(inference.Inference, "_step", short_of_memory)
    record = measured(tiny("16k"))
    assert record["missing_reference"] == "OutOfMemoryError: 9 GiB"
    assert set(record["attentions"]["fbila"]["errors"]) == {"float32", "float32_bound"}
    printed = "\n".join(lines("16k", record))
    assert "compared with official at the smallest size alone: OutOfMemoryError" in printed


def test_a_row_that_cannot_be_set_up(monkeypatch):
    def broken(*_):
        raise ValueError("no UNet")

    monkeypatch.setattr(inference, "make_unet", broken)
    record = measured(tiny("eager"))
    assert (record["status"], record["reason"]) == ("failed", "ValueError: no UNet")
    assert lines("a", record) == ["a  failed: ValueError: no UNet"]
    assert summary({"a": record}) == "1 failed; 0 of 0 goals met"


def test_nothing_is_left_for_the_next_attention(monkeypatch):
    freed = []
    monkeypatch.setattr(turns, "free", lambda: freed.append(1))
    row = tiny("16k")
    measured(row)
    assert len(freed) == row.rounds * len(row.attentions) + 1


@pytest.mark.parametrize(("budget_ms", "count"), [(0, FEWEST), (1e6, MOST)])
def test_repeats(budget_ms, count):
    calls = []
    times = StepTimer("cpu", budget_ms).times(lambda: calls.append(1))
    assert len(times) == count == len(calls) - 3


def test_lines(result):
    record = read(result)["cases"]["eager/tiny/64"]
    printed = lines("eager/tiny/64", record)
    assert len(printed) == 6
    assert all(line.startswith("eager/tiny/64  ") for line in printed)
    assert " x sdpa; " in printed[2] and " x official; error " in printed[2]
    assert "goal time of fbila fused blocks at most 1.10 of sdpa's: " in printed[5]


def test_tables(result, capsys):
    tables.main([str(result)])
    printed = capsys.readouterr().out
    for words in ("- gpu: ", "### eager", "### 16k/eager", "### train", "### goals",
                  "skipped: slow", "absent: not available", "not measured"):  # fmt: skip
        assert words in printed
    for block in printed.split("\n\n"):
        table = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in table}) <= 1


@pytest.fixture
def large(result):
    """The tiny rows under the names of the real ones, with peak memory."""
    content = read(result)
    for record in content["cases"].values():
        for outcome in record["attentions"].values():
            if "ms" in outcome:
                outcome["peak_bytes"] = 2**30
    return content


def test_plot(large, tmp_path):
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(large))
    plot.main([str(path), "--output", str(tmp_path / "plots")])
    (file,) = (tmp_path / "plots").iterdir()
    picture = Image.open(file).convert("RGB")
    assert min(picture.size) > 500
    assert len(picture.getcolors(2**24)) > 20


def test_everything_measured_is_in_the_plot(large):
    figure = plot.step_by_side(plot.by_unet(large), large["machine"])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "softmax, eager", "official LinFusion, eager", "fbila, fused, eager",
        "fbila, fused blocks, eager", "softmax, compiled", "official LinFusion, compiled",
    ]  # fmt: skip
    for panel in figure.axes:
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        sizes = [len(line.get_xdata()) for line in panel.get_lines()]
        assert sizes == [2, 2, 2, 2, 1, 1]


def test_a_result_without_rows_to_plot(tmp_path):
    path = tmp_path / "unet.json"
    path.write_text(json.dumps({"machine": {}, "cases": {}}))
    with pytest.raises(SystemExit, match="no measured row of eager or compiled"):
        plot.main([str(path)])
