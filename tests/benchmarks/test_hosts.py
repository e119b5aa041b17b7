"""The command on a CPU: a tiny backbone goes all the way into JSON, tables and a plot."""

import dataclasses
import json
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from benchmarks import turns
from benchmarks.hosts import __main__ as command
from benchmarks.hosts import models, plot, step, tables
from benchmarks.hosts.models import HOSTS
from benchmarks.hosts.report import lines
from benchmarks.hosts.rows import MODES, PASSES, ROWS, TINY_ROWS, Row, select
from benchmarks.results import read
from benchmarks.turns import measure_subject
from benchmarks.unet.goals import Goal
from benchmarks.unet.timer import StepTimer
from fbila import linear_attn
from fbila.adapters.timm import rope

EACH = pytest.mark.parametrize("row", (*ROWS, *TINY_ROWS), ids=lambda row: row.name)


def lighten(monkeypatch) -> None:
    # Traced, but run as it is: a C++ compiler would take a minute.
    monkeypatch.setitem(step.COMPILE, "backend", "eager")
    # Collecting garbage takes longer than a row.
    monkeypatch.setattr(turns, "free", lambda: None)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    lighten(monkeypatch)
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """All tiny rows, measured once."""
    path = tmp_path_factory.mktemp("hosts") / "folder" / "hosts.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        lighten(monkeypatch)
        assert run(path) == 0
    return path


def run(path, *options) -> int:
    return command.main(["--device", "cpu", "--seconds", "0", "--output", str(path), *options])


def tiny(name: str) -> Row:
    (row,) = select(TINY_ROWS, [name])
    return row


def measured(row: Row) -> dict:
    return measure_subject(row, StepTimer("cpu", 0), lambda: step.make_step(row, "cpu"))


def test_every_row_is_measured(result):
    content = read(result)
    assert content["machine"]["timm"]
    assert list(content["cases"]) == [row.name for row in TINY_ROWS]
    for row in TINY_ROWS:
        record = content["cases"][row.name]
        assert record["status"] == "measured"
        assert list(record["attentions"]) == ["softmax", "linear"]
        for way, outcome in record["attentions"].items():
            assert outcome["ms"] > 0
            assert len(outcome["by_turn"]) == row.rounds
            compared = {"eager"} if row.mode == "compiled" else set()
            if row.kind == "training" and way == "linear":
                compared.add("parameter")
            assert set(outcome["errors"]) == {"float32", "float32_bound"} | compared


def test_the_rows_and_their_goals():
    assert [row.name for row in ROWS] == [
        f"{kind}/{mode}/vit_base_patch16/{px}"
        for kind in ("inference", "training")
        for mode in ("eager", "compiled")
        for px in (224, 512, 1024, 2048)
    ]
    for row in ROWS:
        goals = (Goal("linear", "softmax", 1 / 1.5),) if row.px >= 1024 else ()
        assert row.goals == goals


@EACH
def test_fields_are_known(row):
    host = HOSTS[row.host]
    assert row.kind in PASSES
    assert row.mode in MODES
    assert set(row.attentions) <= set(host.same) <= set(host.ways)
    assert set(host.same.values()) <= set(host.ways)
    assert row.px % 16 == 0


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("mistake", ["queries for keys", "no denominator", "a key less"])
def test_a_mistake_has_no_time(kind, mistake, monkeypatch):
    def wrong(q, k, v, **options):
        if mistake == "queries for keys":
            return linear_attn(k, q, v, **options)
        if mistake == "a key less":
            return linear_attn(q, k[:, :, 1:], v[:, :, 1:], **options)
        return linear_attn(q, k, v, **{**options, "eps": 10.0})

    # The reference puts its own in the place of this.
    monkeypatch.setattr(rope, "linear_attn", wrong)
    record = measured(tiny(f"{kind}/eager/tiny/64"))
    assert record["status"] == "wrong"
    assert "wrong" in record["attentions"]["linear"]
    assert record["attentions"]["softmax"]["ms"] > 0
    assert record["goals"][0]["over"] is None
    printed = lines("row", record)
    assert printed[1].startswith("row  linear   wrong: error against float32 ")


def test_a_parameter_that_is_wrong_among_many_has_no_time(monkeypatch):
    """A fifth of one norm's gradient is missing, which is little of all gradients."""
    linear = HOSTS["tiny"].ways["linear"]

    @contextmanager
    def wrong(model):
        weight = model.blocks[0].norm2.weight
        hook = weight.register_hook(lambda gradient: gradient * 0.8)
        with linear(model):
            yield
        hook.remove()

    ways = {**HOSTS["tiny"].ways, "linear": wrong}
    monkeypatch.setitem(models.HOSTS, "tiny", dataclasses.replace(HOSTS["tiny"], ways=ways))
    record = measured(tiny("training/eager/tiny/64"))
    assert "error of a parameter's gradient" in record["attentions"]["linear"]["wrong"]


def test_what_the_compiler_gets_wrong_has_no_time(monkeypatch):
    def off(model, **_):
        return lambda **inputs: model(**inputs) * 1.2

    monkeypatch.setattr(step.torch, "compile", off)
    record = measured(tiny("inference/compiled/tiny/32"))
    assert "difference from eager mode" in record["attentions"]["linear"]["wrong"]


@pytest.mark.parametrize("kind", PASSES)
def test_each_turn_starts_from_the_same_weights(kind):
    subject = step.make_step(tiny(f"{kind}/eager/tiny/32"), "cpu")
    before = [p.clone() for p in subject.model.parameters()]
    for name in ("softmax", "linear", "softmax"):
        with subject.ready(name) as (call, _):
            call()
            call()
    for p, was in zip(subject.model.parameters(), before, strict=True):
        assert torch.equal(p, was)
        assert p.grad is None


def test_a_step_that_cannot_be_set_up(monkeypatch):
    def broken(px):
        raise ValueError("no model")

    host = models.Host("broken", broken, None, {}, {})
    monkeypatch.setitem(models.HOSTS, "tiny", host)
    record = measured(tiny("inference/eager/tiny/32"))
    assert lines("a", record) == ["a  failed: ValueError: no model"]


def test_list(capsys):
    assert command.main(["--list", "--only", "training/compiled"]) == 0
    assert len(capsys.readouterr().out.split()) == 4
    with pytest.raises(SystemExit, match="No row's name begins with nothing"):
        command.main(["--only", "nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    with pytest.raises(SystemExit, match=r"^benchmarks\.hosts needs a CUDA device\.$"):
        command.main([])


def test_resume_keeps_rows(result, tmp_path):
    content = read(result)
    kept = "inference/eager/tiny/32"
    content["cases"] = {kept: content["cases"][kept], "training/eager/tiny/32": {"status": "wrong"}}
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(content))
    assert run(path, "--resume", "--only", "inference/eager/tiny/32", "training/eager/tiny/32") == 0
    cases = read(path)["cases"]
    assert cases[kept] == content["cases"][kept]
    assert cases["training/eager/tiny/32"]["status"] == "measured"


def test_lines(result):
    record = read(result)["cases"]["inference/eager/tiny/64"]
    record["attentions"]["softmax"]["ms"], record["attentions"]["linear"]["ms"] = 20.0, 10.0
    printed = lines("row", record)
    assert printed[0].startswith("row  softmax  50.0 images/s; 20.00 ms [")
    assert printed[1].startswith("row  linear   100.0 images/s; 10.00 ms [")
    assert "; 2.00 x the throughput of softmax; error " in printed[1]
    assert printed[2].startswith("row  goal time of linear at most 0.67 of softmax's: ")


def test_tables(result, capsys):
    tables.main([str(result)])
    printed = capsys.readouterr().out
    for words in ("- timm: ", "### inference, eager, bfloat16", "### goals"):
        assert words in printed
    assert "| tiny | 32 | 2 | softmax |" in printed
    for block in printed.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_a_table_says_why_there_is_no_number():
    case = {"host": "tiny", "px": 32, "batch": 2}
    wrong = {"case": case, "attentions": {"softmax": {"wrong": "by 2"}}}
    failed = {"case": case, "status": "failed", "reason": "no model"}
    assert "| softmax | wrong: by 2 |" in tables.table([wrong])
    assert "|  | failed: no model |" in tables.table([failed])


def test_where_linear_wins_is_said_plainly(result):
    content = read(result)
    for record in content["cases"].values():
        for name, outcome in record["attentions"].items():
            outcome["ms"] = 10.0 if (name == "linear") == (record["case"]["px"] > 32) else 20.0
    modes = [f"{kind}, {mode}" for kind in PASSES for mode in MODES]
    words = "from 64 px on (0.50 at 32, 2.00 at 64)"
    assert tables.crossovers(content) == [f"a tiny ViT, {mode}: {words}" for mode in modes]
    assert (
        tables.crossover({224: 1.2, 512: 0.9}) == "at no side measured (1.20 at 224, 0.90 at 512)"
    )
    assert tables.crossover({512: 2.0}) == "from 512 px on (2.00 at 512)"


def test_plot(result, tmp_path):
    plot.main([str(result), "--output", str(tmp_path / "plots")])
    (file,) = (tmp_path / "plots").iterdir()
    picture = Image.open(file).convert("RGB")
    assert min(picture.size) > 500
    assert len(picture.getcolors(2**24)) > 20


def test_everything_measured_is_in_the_plot(result):
    content = read(result)
    figure = plot.throughput_by_side(plot.by_panel(content), content["machine"])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["softmax, eager", "linear, eager", "softmax, compiled", "linear, compiled"]
    assert [panel.get_title() for panel in figure.axes] == [
        "a tiny ViT, inference",
        "a tiny ViT, training",
    ]
    for panel in figure.axes:
        assert [len(line.get_xdata()) for line in panel.get_lines()] == [2, 2, 2, 2]


def test_a_result_without_rows_to_plot(tmp_path):
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"machine": {}, "cases": {}}))
    with pytest.raises(SystemExit, match="no measured row of softmax or linear"):
        plot.main([str(path)])
