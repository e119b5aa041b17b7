"""The tables of a rotary embedding are made once for all layers, and are those of the moment."""

import copy
import gc
import weakref

import backbones
import pytest
import torch
from helpers import DEVICE
from linear_models import CASES

import fbila
from fbila.adapters.acceleration import sana_video
from fbila.adapters.timm import rope as timm_rope
from fbila.adapters.timm import swap
from fbila.ops import kernel_inputs

FIXED = ["eva", "rope", "rope, halves", "rope, grouped", "eva, separate"]


@pytest.fixture
def made(monkeypatch):
    """The tables that were made, of timm's embedding."""
    tables, right = [], timm_rope._tables

    def count(*args):
        tables.append(right(*args))
        return tables[-1]

    monkeypatch.setattr(timm_rope, "_tables", count)
    return tables


def model_of(kind: str) -> torch.nn.Module:
    return backbones.MODELS[kind]().to(DEVICE)


@torch.no_grad()
def predict(model: torch.nn.Module, size: int = backbones.SIZE) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return model(backbones.picture(size).to(DEVICE, dtype))


@pytest.mark.parametrize("kind", FIXED)
def test_layers_and_passes_share_one(kind, made):
    model = model_of(kind)
    swap(model)
    first = predict(model)
    assert torch.equal(predict(model), first)
    assert len(made) == 1


@pytest.mark.parametrize("kind", FIXED)
def test_a_model_that_is_cast_has_others(kind):
    model = model_of(kind)
    swap(model)
    predict(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        fresh = copy.deepcopy(model)
        assert torch.equal(predict(model), predict(fresh))


def test_a_picture_of_another_size_has_others(made):
    model = backbones.eva(attn_type="rope", dynamic_img_size=True).to(DEVICE)
    swap(model)
    small = predict(model)
    assert predict(model, 48).isfinite().all()
    assert len(made) == 2
    assert torch.equal(predict(model), small)


def test_an_embedding_that_is_changed_in_place(made):
    model = model_of("rope")
    swap(model)
    before = predict(model)
    model.rope.pos_embed.mul_(0.5)
    after = predict(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, predict(copy.deepcopy(model)))


def test_tables_go_with_their_embedding():
    for prefix in (0, 1):
        rope = torch.randn(16, 32, device=DEVICE)
        tables = timm_rope.as_rotary(rope, prefix, True)
        assert timm_rope.as_rotary(rope, prefix, True) is tables
        gone = weakref.ref(tables.cos)
        del rope, tables
        gc.collect()
        assert gone() is None
    cos = torch.randn(1, 5, 1, 8, device=DEVICE)
    tables = sana_video.as_rotary((cos, cos), torch.zeros(1, 5, 8))
    gone = weakref.ref(tables[0])
    del cos, tables
    gc.collect()
    assert gone() is None


def test_training_after_inference():
    model = model_of("rope, halves")
    swap(model)
    with torch.inference_mode():
        model(backbones.picture().to(DEVICE))
    model(backbones.picture().to(DEVICE)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["eva", "rope, halves"])
def test_compiled_and_cast(kind):
    model = model_of(kind)
    swap(model)
    predict(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled), predict(model), rtol=0, atol=1e-5)
    model.double()
    assert predict(compiled).dtype == torch.float64
    torch.testing.assert_close(predict(compiled), predict(model), rtol=0, atol=1e-10)
    torch._dynamo.reset()


@torch.no_grad()
def test_layers_of_a_video_model_share_one(monkeypatch):
    case, made = CASES["SanaVideo"], []
    right = kernel_inputs._table
    monkeypatch.setattr(kernel_inputs, "_table", lambda *args: made.append(1) or right(*args))
    monkeypatch.setattr("fbila.ops.functional.choose_implementation", lambda *_: "triton")
    model = case.make()
    fbila.accelerate(model)
    modules = fbila.adapters.get_handle(model).modules.values()
    assert sum(isinstance(m, sana_video.FastSanaVideoAttention) for m in modules) == 2
    case.run(model)
    assert len(made) == 1
