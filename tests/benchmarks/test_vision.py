"""The command for vision models on a CPU: tiny layers and a model go into JSON, tables, a plot."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import turns
from benchmarks.hosts import step as hosts_step
from benchmarks.hosts.report import lines
from benchmarks.results import read
from benchmarks.turns import measure_subject
from benchmarks.unet.goals import Goal
from benchmarks.unet.timer import StepTimer
from benchmarks.vision import __main__ as command
from benchmarks.vision import plot, step, tables
from benchmarks.vision.models import HOSTS
from benchmarks.vision.official import OFFICIAL, official
from benchmarks.vision.rows import LAYERS, MODELS, ROWS, TINY_ROWS, WAYS, Row, select
from fbila import layers

# What is compiled, and the row it is compiled in.
FEW = ("layers/inference/tiny_rala", "layers/forward+backward/tiny_focused", "models", "graphs")


def lighten(monkeypatch) -> None:
    # Traced, but run as it is: a C++ compiler would take a minute.
    monkeypatch.setitem(hosts_step.COMPILE, "backend", "eager")
    # Collecting garbage takes longer than a row; what is compiled must be forgotten none the less,
    # since the ways are the same code but for a method.
    monkeypatch.setattr(turns, "free", torch.compiler.reset)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    lighten(monkeypatch)
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Some tiny rows, measured once."""
    path = tmp_path_factory.mktemp("vision") / "folder" / "vision.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        lighten(monkeypatch)
        assert run(path, "--only", *FEW) == 0
    return path


def run(path, *options) -> int:
    return command.main(["--device", "cpu", "--seconds", "0", "--output", str(path), *options])


def tiny(name: str) -> Row:
    (row,) = select(TINY_ROWS, [name])
    return row


def measured(row: Row) -> dict:
    return measure_subject(row, StepTimer("cpu", 0), lambda: step.make_step(row, "cpu"))


def test_rows_are_measured(result):
    cases = read(result)["cases"]
    assert list(cases) == [row.name for row in select(TINY_ROWS, FEW)]
    for row in select(TINY_ROWS, FEW):
        record = cases[row.name]
        assert record["status"] == "measured"
        assert tuple(record["attentions"]) == row.attentions
        for way, outcome in record["attentions"].items():
            assert outcome["ms"] > 0
            compared = {"eager"} if WAYS[way][1] else set()
            if row.kind == "training" and WAYS[way][0] == "fbila":
                compared.add("parameter")
            assert set(outcome["errors"]) == {"float32", "float32_bound"} | compared


def test_the_rows_and_their_goals():
    assert len({row.name for row in ROWS}) == len(ROWS)
    models = {(r.host, r.px, r.kind): r for r in ROWS if r.part == "models"}
    assert len(models) == 16
    for name in MODELS:
        for px in (224, 512):
            times = (Goal("fbila", "eager", 1 / 1.3), Goal("fbila compiled", "compiled", 1 / 1.3))
            lighter = Goal("fbila", "eager", 0.8, quantity="peak_bytes")
            assert models[name, px, "inference"].goals == times
            assert models[name, px, "training"].goals == (*times, lighter)
            assert models[name, px, "training"].batch == 64
    graphs = {r.host: r for r in ROWS if r.part == "graphs"}
    assert graphs.keys() == set(MODELS)
    for row in graphs.values():
        assert (row.kind, row.px, row.mode, row.weighed) == ("training", 224, "graph", False)
        assert row.goals == times
    alone = {(r.host, r.px, r.kind): r for r in ROWS if r.part == "layers"}
    assert len(alone) == 4 * len(LAYERS)
    for row in alone.values():
        assert [goal.reference for goal in row.goals] == ["eager", "compiled"]
        assert {goal.factor for goal in row.goals} == {1 / 2.5}
        assert row.batch * row.px**2 == 64 * 3136


@pytest.mark.parametrize("row", (*ROWS, *TINY_ROWS), ids=lambda row: row.name)
def test_fields_are_known(row):
    assert row.host in HOSTS
    assert set(row.attentions) <= WAYS.keys()
    assert {way for way, _ in WAYS.values()} == HOSTS[row.host].ways.keys()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["inference", "forward+backward"])
def test_the_official_operations_are_the_layer(name, kind):
    """In float64: what is compared with is not what one would rather compare with."""
    row = tiny(f"layers/{kind}/tiny_{name}/6")
    subject = step.make_step(row, "cpu")
    # Tables of float32 are in the official code, too.
    subject.model.double()
    inputs = {key: x.double() for key, x in subject.inputs.items()}
    results = []
    for way in ("eager", "fbila"):
        with subject._mode(), subject.host.ways[way](subject.model):
            results.append(subject._result(subject.model, inputs))
    # The official ones of some go through float32.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_every_layer_has_official_operations():
    assert set(OFFICIAL) == {
        getattr(layers, name)
        for name in layers.__all__
        if name not in ("LinearAttention", "GeneralizedLinearAttention")
    }


def test_layers_get_their_own_forward_back():
    layer = layers.RALA(16, 1)
    assert "forward" not in vars(layers.RALA)
    with official(layer):
        assert layers.RALA.forward is OFFICIAL[layers.RALA]
    assert "forward" not in vars(layers.RALA)
    own = layers.MLLALinearAttention.forward
    with pytest.raises(KeyError), official(layers.MLLALinearAttention(16, 1)):
        raise KeyError
    assert layers.MLLALinearAttention.forward is own
    with (
        pytest.raises(ValueError, match="Linear has none of the layers"),
        official(torch.nn.Linear(1, 1)),
    ):
        pass


def test_what_a_compiler_sees_in_parts_has_no_time(monkeypatch):
    def parted(self, x, *others):
        torch._dynamo.graph_break()
        return whole(self, x, *others)

    whole = OFFICIAL[layers.RALA]
    monkeypatch.setitem(OFFICIAL, layers.RALA, parted)
    outcomes = measured(tiny("layers/inference/tiny_rala"))["attentions"]
    assert "ms" in outcomes["eager"] and "ms" in outcomes["fbila"]
    assert "Unsupported" in outcomes["compiled"]["failed"]


@pytest.mark.parametrize("kind", ["inference", "training"])
def test_a_mistake_has_no_time(kind, monkeypatch):
    from fbila.layers import focused

    right = focused.focused_la
    monkeypatch.setattr(focused, "focused_la", lambda q, k, v, **kw: right(k, q, v, **kw))
    record = measured(tiny(f"models/{kind}/tiny/32"))
    assert record["status"] == "wrong"
    assert "wrong" in record["attentions"]["fbila"]
    assert record["attentions"]["eager"]["ms"] > 0
    assert all(goal["over"] is None for goal in record["goals"])


def test_each_turn_starts_from_the_same_weights():
    subject = step.make_step(tiny("models/training/tiny/32"), "cpu")
    before = [p.clone() for p in subject.model.parameters()]
    for name in ("eager", "fbila"):
        with subject.ready(name) as (call, _):
            call()
            call()
    for p, was in zip(subject.model.parameters(), before, strict=True):
        assert torch.equal(p, was)


def test_the_gate_leaves_statistics_of_batches_aside():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).train()
    x = torch.randn(2, 3, 4, 4)
    model(x)
    with step.affine_norms(model):
        torch.testing.assert_close(model(x), model[0](x), rtol=1e-4, atol=1e-4)
    assert model[1].training
    assert not torch.allclose(model(x), model[0](x), atol=1e-2)


def test_list(capsys):
    assert command.main(["--list", "--only", "models/training"]) == 0
    assert len(capsys.readouterr().out.split()) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    with pytest.raises(SystemExit, match=r"^benchmarks\.vision needs a CUDA device\.$"):
        command.main([])


def test_tables(result, capsys):
    tables.main([str(result)])
    printed = capsys.readouterr().out
    for words in ("### layers, inference", "### models, training", "### goals", "36 tokens"):
        assert words in printed
    assert "| a tiny ViT | 32 px | 2 | fbila compiled |" in printed
    for block in printed.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


def test_gains_and_reasons():
    case = {"part": "models", "host": "tiny", "px": 32, "batch": 2}
    times = {"ms_20": 1, "ms_80": 1}
    outcomes = {
        "eager": {"ms": 3.0, "peak_bytes": 2**30, **times},
        "compiled": {"out_of_memory": "much"},
        "fbila": {"ms": 2.0, "peak_bytes": 2**29, **times},
    }
    printed = tables.table([{"case": case, "attentions": outcomes}])
    assert "| fbila | 2.000 | 1.000 | 1.000 | 1.50 |  | 0.50 | 0.50 |" in printed
    assert "| compiled | out of memory: much |" in printed
    failed = {"case": case, "status": "failed", "reason": "no model"}
    assert "|  | failed: no model |" in tables.table([failed])


def test_plot(result, tmp_path):
    plot.main([str(result), "--output", str(tmp_path / "plots")])
    (file,) = (tmp_path / "plots").iterdir()
    picture = Image.open(file).convert("RGB")
    assert min(picture.size) > 500
    assert len(picture.getcolors(2**24)) > 20


def test_everything_measured_is_in_the_plot(result):
    content = read(result)
    figure = plot.gains(plot.by_panel(content), content["machine"])
    assert [panel.get_title() for panel in figure.axes] == [
        "layers, inference",
        "layers, forward+backward",
        "models, inference",
        "models, training",
        "graphs, training",
    ]
    assert [len(panel.containers) for panel in figure.axes] == [2, 2, 3, 3, 3]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {*plot.BARS, "goal"} == set(labels)


def test_a_result_without_rows_to_plot(tmp_path):
    path = tmp_path / "vision.json"
    path.write_text(json.dumps({"machine": {}, "cases": {}}))
    with pytest.raises(SystemExit, match="no measured row"):
        plot.main([str(path)])


def test_lines(result):
    record = read(result)["cases"]["models/inference/tiny/32"]
    record["attentions"]["eager"]["ms"], record["attentions"]["fbila"]["ms"] = 20.0, 10.0
    printed = lines("row", record)
    assert "; 2.00 x the throughput of eager; error " in printed[2]
    assert any(
        line.startswith("row  goal time of fbila at most 0.77 of eager's") for line in printed
    )
