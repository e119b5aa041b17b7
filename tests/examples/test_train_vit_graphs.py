"""examples/train_vit.py --cuda-graph trains what the same run without it trains."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CUDA

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import graphed
import recorders
import train_vit
from test_train_vit import run, same

OPTIONS = "--attention rala --epochs 3"


@pytest.mark.skipif(CUDA, reason="a GPU has no need of a stand-in")
def test_training_is_the_same(tmp_path, monkeypatch):
    eager, weights = run(tmp_path / "eager", OPTIONS)
    parse = train_vit.parse

    def with_gpu(arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return parse(arguments)

    monkeypatch.setattr(train_vit, "parse", with_gpu)
    recorded = recorders.counting(monkeypatch, recorders.StandIn)
    graphs, again = run(tmp_path / "graphs", f"{OPTIONS} --cuda-graph")
    assert len(recorded) == 1
    assert same(weights, again)
    assert graphs["losses"] == eager["losses"]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_replayed_training_is_near(tmp_path, monkeypatch):
    """In float32, where only the order of a GPU's sums differs; the first losses are the same."""
    eager, _ = run(tmp_path / "eager", OPTIONS)
    recorded = recorders.counting(monkeypatch, graphed.Recorder)
    graphs, _ = run(tmp_path / "graphs", f"{OPTIONS} --cuda-graph")
    assert len(recorded) == 1
    assert graphs["losses"] == pytest.approx(eager["losses"], rel=1e-2)
    assert graphs["losses"][0] == pytest.approx(eager["losses"][0], rel=1e-4)


def test_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train_vit.main(["--cuda-graph"])
    assert "--cuda-graph needs a CUDA GPU" in capsys.readouterr().err


def test_refused_for_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    several = SimpleNamespace(distributed_type=train_vit.DistributedType.MULTI_GPU)
    monkeypatch.setattr(train_vit, "Accelerator", lambda **_: several)
    with pytest.raises(SystemExit, match="--cuda-graph is for a single process"):
        train_vit.main(["--cuda-graph"])
