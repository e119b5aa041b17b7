"""Which of timm's models can be swapped: every name of every family that has such attention."""

import sys
from collections import Counter

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from timm.models import _registry
from timm.models.eva import EvaAttention
from torch import nn

from fbila.adapters.timm import LinearAttention, plan, swap
from fbila.adapters.timm.attention import LINEAR

CLASSES = (Attention, AttentionRope, EvaAttention)
# As timm 1.0.31 has them; later ones may have more.
COUNTED = "1.0.31"
NAMES = 314
BY_CLASS = {"Attention": 237, "AttentionRope": 41, "EvaAttention": 36}
TAKE_ATTN_LAYER = 213
TAKERS = {"VisionTransformer", "VisionTransformerDistilled", "NaFlexVit"}
# How many names have attention beside it that stays as it is.
MIXED = {
    "has one query, or a few learned ones, and is linear in the tokens already": 38,
}


def families() -> set[str]:
    """The modules of timm that know one of the three classes, or a block of one that does."""
    known = {Attention.__module__, EvaAttention.__module__}
    loaded = {name: sys.modules.get(f"timm.models.{name}") for name in _registry._module_to_models}
    # Others than timm register models as well, fbila among them.
    modules = {name: module for name, module in loaded.items() if module is not None}

    def knows(module) -> bool:
        kinds = [v for v in vars(module).values() if isinstance(v, type)]
        return any(
            kind in CLASSES or (issubclass(kind, nn.Module) and kind.__module__ in known)
            for kind in kinds
        )

    while new := {m.__name__ for m in modules.values() if knows(m)} - known:
        known |= new
    return {name for name, module in modules.items() if module.__name__ in known}


def names() -> list[str]:
    of_family = families()
    return [n for n in timm.list_models() if _registry._model_to_module[n] in of_family]


@pytest.fixture(autouse=True)
def without_initialisation(monkeypatch):
    """On the meta device it changes nothing, and takes most of the time."""
    for init in ("trunc_normal_", "normal_", "uniform_", "xavier_uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, init, lambda tensor, *_, **__: tensor)
    monkeypatch.setattr("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor)


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def test_every_name():
    kinds, reasons, layered = Counter(), Counter(), 0
    for name in names():
        model = on_meta(name)
        expected = [n for n, m in model.named_modules() if type(m) in CLASSES]
        report = plan(model)
        assert [e.name for e in report.swapped] == expected, name
        if not expected:
            continue
        sources = {e.source for e in report.swapped}
        assert len(sources) == 1
        kinds.update(sources)
        reasons.update(set(report.reasons()))
        with swap(model) as handle:
            assert handle.report == report
            assert {type(handle.modules[n]) for n in expected} <= set(LINEAR.values())
        if type(model).__name__ in TAKERS:
            layered += 1
            made = on_meta(name, attn_layer=LinearAttention)
            assert list(made.state_dict()) == list(model.state_dict())
            assert {n for n, m in made.named_modules() if type(m) is LinearAttention} == {*expected}
    if timm.__version__ == COUNTED:
        assert kinds == BY_CLASS
        assert kinds.total() == NAMES
        assert reasons == MIXED
        assert layered == TAKE_ATTN_LAYER
    assert kinds >= Counter(BY_CLASS)
    assert layered >= TAKE_ATTN_LAYER
