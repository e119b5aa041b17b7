"""examples/distill.py --cuda-graph trains what the same run without it trains."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from helpers import CUDA
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import distill
import graphed
import recorders
from test_distill import WEIGHTS, log_of, run

OPTIONS = "--steps 12 --accumulate 2 --ema 0.5 --save-minutes 0"
KINDS = [
    pytest.param(False, id="stand-in"),
    pytest.param(
        True, id="cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")]
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny_models.sd_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def recorded(request, monkeypatch):
    """What is recorded in graphs, or by what stands for them where there is no GPU."""
    if request.param:
        return recorders.counting(monkeypatch, graphed.Recorder)
    parse = distill.parse

    def with_gpu(arguments):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return parse(arguments)

    monkeypatch.setattr(distill, "parse", with_gpu)
    return recorders.counting(monkeypatch, recorders.StandIn)


def assert_same_training(model, tmp_path, first, second):
    """The same losses and weights: on a GPU up to what the order of its sums makes of a run."""
    for a, b in zip(log_of(first), log_of(second), strict=True):
        for name in ("total", "task", "prediction", "attention", "lr"):
            assert a[name] == pytest.approx(b[name], rel=2e-2 if CUDA else 0, abs=0)
    start = run(model, tmp_path / "start", "--steps 1 --lr 0")
    weights = [load_file(w / "weights" / WEIGHTS) for w in (first, second)]
    a, b, start = (torch.cat([w[name].flatten() for name in start]) for w in (*weights, start))
    apart, moved = (a - b).norm().item(), (a - start).norm().item()
    # AdamW moves a weight as far for a gradient of rounding errors as for any other.
    assert apart <= (0.2 if CUDA else 0) * moved and moved > 0


def test_training_is_the_same(model, tmp_path, recorded):
    run(model, tmp_path / "eager", OPTIONS)
    assert not recorded
    run(model, tmp_path / "graphs", OPTIONS, "--cuda-graph")
    assert len(recorded) == 2
    assert_same_training(model, tmp_path, tmp_path / "eager", tmp_path / "graphs")


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch, recorded):
    run(model, tmp_path / "whole", OPTIONS)
    log = distill.log

    def interrupted(file, step, **entry):
        if step == 7:
            raise KeyboardInterrupt
        log(file, step=step, **entry)

    monkeypatch.setattr(distill, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", OPTIONS, "--cuda-graph")
    monkeypatch.setattr(distill, "log", log)
    before = len(recorded)
    run(model, tmp_path / "parts", OPTIONS, "--cuda-graph --resume")
    assert 0 < before < len(recorded)
    assert_same_training(model, tmp_path, tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "option", ["--mixed-precision fp16", "--gradient-checkpointing", "--compile"]
)
def test_options_that_are_refused(option, capsys):
    with pytest.raises(SystemExit) as ended:
        distill.main(["--cuda-graph", *option.split()])
    assert ended.value.code == 2
    assert f"--cuda-graph does not go with {option}" in capsys.readouterr().err


def test_refused_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        distill.main(["--cuda-graph"])
    assert "--cuda-graph needs a CUDA GPU" in capsys.readouterr().err


def test_refused_for_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    several = SimpleNamespace(distributed_type=distill.DistributedType.MULTI_GPU)
    monkeypatch.setattr(distill, "Accelerator", lambda **_: several)
    with pytest.raises(SystemExit, match="--cuda-graph is for a single process"):
        distill.main(["--cuda-graph"])
