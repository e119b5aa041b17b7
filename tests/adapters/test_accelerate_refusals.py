"""What cannot be accelerated is left as it is, with the reason, and doing nothing is an error."""

from types import SimpleNamespace

import pytest
import timm
import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)
from linear_models import CASES
from timm.models.efficientvit_mit import LiteMLA
from torch import nn
from untouched import modules

import fbila
from fbila.adapters import AdapterError
from fbila.adapters.acceleration import plan


def sana() -> nn.Module:
    return CASES["Sana"].make()


def reason_of(model: nn.Module, name: str) -> str:
    return next(entry.reason for entry in plan(model).skipped if entry.name == name)


class Custom(SanaLinearAttnProcessor2_0):
    pass


def test_cross_attention_and_custom_processors_stay():
    model = sana()
    blocks = model.transformer_blocks
    custom = Custom()
    blocks[0].attn1.set_processor(custom)
    words = "for which there are no kernels here"
    assert reason_of(model, "transformer_blocks.0.attn1") == f"runs Custom, {words}"
    assert reason_of(model, "transformer_blocks.0.attn2") == f"runs SanaAttnProcessor2_0, {words}"
    handle = fbila.accelerate(model)
    assert list(handle.modules) == [f"transformer_blocks.{x}" for x in ("0.ff", "1.attn1", "1.ff")]
    assert blocks[0].attn1.processor is custom


def test_other_feature_maps_stay():
    model = CASES["EfficientViT"].make()
    name = plan(model).swapped[0].name
    model.get_submodule(name).kernel_func = nn.GELU()
    assert reason_of(model, name) == "has the feature map GELU, not ReLU"
    model = CASES["DC-AE"].make()
    name = plan(model).swapped[0].name
    model.get_submodule(name).nonlinearity = nn.SiLU()
    assert reason_of(model, name) == "has the feature map SiLU, not ReLU"


def test_subclasses_hooked_compiled_and_wide_ones_stay():
    class OtherAttention(LiteMLA):
        pass

    model = nn.ModuleDict({
        "subclass": OtherAttention(16, 16, dim=8),
        "hooked": LiteMLA(16, 16, dim=8),
        "compiled": LiteMLA(16, 16, dim=8),
        "wide": SanaMultiscaleLinearAttention(512, 512, attention_head_dim=512),
        "fine": LiteMLA(16, 16, dim=8),
    })  # fmt: skip
    model["hooked"].forward = lambda x: x
    model["compiled"].compile()
    report = plan(model)
    assert [entry.name for entry in report.swapped] == ["fine"]
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons == {
        "subclass": "is not a linear attention that there are kernels for",
        "hooked": "had its forward replaced, as accelerate's hooks do, which would be lost",
        "compiled": "was compiled by itself; compile it afterwards",
        "wide": "has 512 channels a head, more than 256",
    }
    with pytest.raises(AdapterError, match="is the model itself"):
        fbila.accelerate(model["fine"])


def test_nothing_to_accelerate_is_an_error():
    model = timm.create_model("test_vit")
    there = modules(model)
    with pytest.raises(AdapterError, match=r"No attention module was swapped in VisionTransformer"):
        fbila.accelerate(model)
    with pytest.raises(AdapterError, match=r"fbila\.adapters\.acceleration\.plan\(model\)"):
        fbila.accelerate(nn.Linear(2, 2))
    assert modules(model) == there
    model = sana()
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor2_0())
    with pytest.raises(AdapterError, match="runs AttnProcessor2_0"):
        fbila.accelerate(model, include=r".*attn\d")


def test_names_choose():
    model = sana()
    handle = fbila.accelerate(model, include=r"transformer_blocks\.1\..*")
    assert list(handle.modules) == ["transformer_blocks.1.attn1", "transformer_blocks.1.ff"]
    handle.unmount()
    assert list(fbila.accelerate(model, exclude=["1.attn1", "ff"]).modules) == [
        "transformer_blocks.0.attn1"
    ]


def test_twice_is_refused_and_the_reason_is_given():
    model = sana()
    fbila.accelerate(model)
    assert reason_of(model, "transformer_blocks.0.attn1") == "is accelerated already"
    with pytest.raises(AdapterError, match="is accelerated already"):
        fbila.accelerate(model)


def test_what_is_no_model_is_refused():
    pipeline = SimpleNamespace(
        components={"transformer": nn.Linear(1, 1), "vae": nn.Linear(1, 1), "scheduler": None}
    )
    with pytest.raises(AdapterError, match="accelerated one by one: transformer, vae"):
        fbila.accelerate(pipeline)
    with pytest.raises(AdapterError, match=r"Expected an nn\.Module, got dict"):
        fbila.accelerate({})


@torch.no_grad()
def test_a_module_that_somebody_else_replaced_is_not_undone():
    model = sana()
    handle = fbila.accelerate(model)
    model.transformer_blocks[0].attn1 = nn.Identity()
    with pytest.raises(AdapterError, match="is now a Identity"):
        handle.unmount()


@torch.no_grad()
def test_behind_compile():
    case = CASES["EfficientViT"]
    model = case.make()
    compiled = torch.compile(model, backend="eager")
    handle = fbila.accelerate(compiled)
    assert handle.model is model
    fbila.adapters.unswap(compiled)
    assert type(model.get_submodule(handle.report.swapped[0].name)) is LiteMLA
