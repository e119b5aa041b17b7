"""What is mounted comes off again, bit for bit, and the model stays usable in between."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from untouched import modules, untouched

from fbila import LinFusion
from fbila.adapters import AdapterError, get_handle, swap, unswap
from fbila.adapters.linfusion.attention import LinFusionAttention

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


def mounted_on(unet) -> LinFusion:
    return LinFusion.construct_for(unet=unet, load_pretrained=False)


@pytest.mark.parametrize("make", [tiny_models.sd15_unet, tiny_models.sdxl_unet])
def test_unmount_restores_every_module(make):
    unet = make()
    with untouched(unet):
        before = tiny_models.predict(unet)
        linfusion = mounted_on(unet)
        assert linfusion.mounted
        assert not torch.allclose(tiny_models.predict(unet), before, atol=1e-4)
        linfusion.unmount()
        assert not linfusion.mounted


def test_mounting_again_gives_the_same_linear_model(unet):
    linfusion = mounted_on(unet)
    linear, there = tiny_models.predict(unet), modules(unet)
    linfusion.unmount()
    linfusion.mount_to(unet=unet)
    assert modules(unet) == there
    assert torch.equal(tiny_models.predict(unet), linear)


def test_mounting_and_unmounting_twice_change_nothing(unet):
    with untouched(unet):
        linfusion = mounted_on(unet)
        there = modules(unet)
        assert linfusion.mount_to(unet) == linfusion.report
        assert modules(unet) == there
        linfusion.unmount()
        assert linfusion.unmount() == linfusion.report


def test_mounting_something_else_on_top_is_refused(unet):
    with untouched(unet):
        linfusion = mounted_on(unet)
        there = modules(unet)
        with pytest.raises(AdapterError, match="carries a swap already"):
            mounted_on(unet)
        with pytest.raises(AdapterError, match="No attention module was swapped"):
            LinFusion(**linfusion.config).mount_to(unet)
        assert modules(unet) == there
        linfusion.unmount()


def test_one_linfusion_one_unet(unet):
    linfusion = mounted_on(unet)
    other = tiny_models.small_unet()
    with untouched(other), pytest.raises(AdapterError, match="mounted on another UNet"):
        linfusion.mount_to(other)


def test_what_nobody_touched_changes_places_quickly(unet, monkeypatch):
    linfusion = mounted_on(unet)
    linear = tiny_models.predict(unet)
    monkeypatch.setattr(swap, "carry", None)  # takes most of the time otherwise
    for _ in range(2):
        with linfusion.disabled():
            unet.train()
        assert all(layer.training for layer in linfusion.layers)
        unet.eval()
    assert torch.equal(tiny_models.predict(unet), linear)


@pytest.mark.parametrize("where", ["mounted", "disabled"])
def test_dtypes_go_over_however_quickly_they_change_places(unet, where):
    linfusion = mounted_on(unet)
    if where == "mounted":
        unet.double()
    with linfusion.disabled():
        if where == "disabled":
            unet.double()
    dtypes = {p.dtype for p in linfusion.parameters()}
    assert dtypes == {torch.float64}
    with linfusion.disabled():
        dtypes = {p.dtype for p in unet.get_submodule(LAYER).parameters()}
    assert dtypes == {torch.float64}


@pytest.mark.parametrize("when", ["mounted", "disabled"])
def test_linfusion_may_be_wider_than_the_unet(unet, when):
    """As it is trained: float32 weights in a frozen UNet of 16 bits."""
    unet.bfloat16()
    linfusion = mounted_on(unet)
    with linfusion.disabled() if when == "disabled" else nullcontext():
        linfusion.float()
    for _ in range(2):
        with linfusion.disabled():
            assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in linfusion.parameters()} == {torch.float32}
    unet.half()
    with linfusion.disabled():
        assert {p.dtype for p in unet.parameters()} == {torch.float16}
    assert {p.dtype for p in unet.parameters()} == {torch.float16}


def test_disabled_is_the_softmax_model(unet):
    softmax, there = tiny_models.predict(unet), modules(unet)
    linfusion = mounted_on(unet)
    linear, mounted = tiny_models.predict(unet), modules(unet)
    with linfusion.disabled():
        assert not linfusion.mounted
        assert modules(unet) == there
        assert torch.equal(tiny_models.predict(unet), softmax)
        with linfusion.disabled():
            assert modules(unet) == there
        assert modules(unet) == there
    with pytest.raises(RuntimeError, match="inside"), linfusion.disabled():
        raise RuntimeError("inside")
    assert linfusion.mounted
    assert modules(unet) == mounted
    assert torch.equal(tiny_models.predict(unet), linear)


def test_unmounting_while_disabled_stays_unmounted(unet):
    with untouched(unet):
        linfusion = mounted_on(unet)
        with linfusion.disabled():
            linfusion.unmount()
        assert not linfusion.mounted


def test_the_originals_follow_the_model(unet):
    linfusion = mounted_on(unet)
    unet.to(torch.float64).train()
    with linfusion.disabled():
        assert {p.dtype for p in unet.parameters()} == {torch.float64}
        assert all(m.training for m in unet.modules())
        unet.to(torch.float32).eval()
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert not any(m.training for m in unet.modules())


def test_layers_take_the_dtype_of_what_they_replace(unet):
    linfusion = mounted_on(unet.to(torch.float64))
    assert {p.dtype for p in linfusion.parameters()} == {torch.float64}
    linfusion.unmount()
    linfusion.mount_to(tiny_models.small_unet())
    assert {p.dtype for p in linfusion.parameters()} == {torch.float32}


def test_a_module_that_somebody_else_replaced_is_left(unet):
    linfusion = mounted_on(unet)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1 = nn.Identity()
    there = modules(unet)
    message = f"{LAYER} is now a Identity, not the module fbila mounted; it was left as it is."
    with pytest.raises(AdapterError, match=message):
        linfusion.unmount()
    assert modules(unet) == there


def test_unswap_needs_no_linfusion(unet):
    with untouched(unet):
        mounted_on(unet)
        assert len(unswap(unet).swapped) == 6
        with pytest.raises(AdapterError, match="carries no swap"):
            unswap(unet)


def test_a_pipeline_and_a_compiled_unet_are_looked_into(pipeline_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    unet = pipeline.unet
    pipeline.unet = torch.compile(unet, backend="eager")  # which leaves a mark on the UNet
    with untouched(unet):
        linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
        assert get_handle(unet) is get_handle(pipeline.unet) is not None
        assert isinstance(unet.get_submodule(LAYER), LinFusionAttention)
        linfusion.unmount()
        LinFusion.construct_for(unet=pipeline.unet, load_pretrained=False).unmount()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_model_of_its_own(unet, duplicate, tmp_path):
    softmax = tiny_models.predict(unet)
    linfusion = mounted_on(unet)
    linear = tiny_models.predict(unet)
    clone = duplicate(unet)
    linfusion.unmount()
    assert torch.equal(tiny_models.predict(clone), linear)
    clone.save_pretrained(tmp_path)
    saved = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(tiny_models.predict(saved), softmax)
    assert torch.equal(tiny_models.predict(clone), linear)
    unswap(clone)
    assert torch.equal(tiny_models.predict(clone), softmax)
    assert not modules(clone).keys() ^ modules(unet).keys()


def test_a_mounted_pipeline_saves_the_original(pipeline_folder, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    softmax = tiny_models.predict(pipeline.unet)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert linfusion.mounted
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    again = StableDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(tiny_models.predict(again.unet), softmax)
    linfusion.unmount()
    assert "save_pretrained" not in vars(pipeline.unet)


def test_the_layers_are_attention_to_diffusers(unet):
    names = list(unet.attn_processors)
    linfusion = mounted_on(unet)
    linear = tiny_models.predict(unet)
    assert list(unet.attn_processors) == names
    keys = list(unet.state_dict())
    unet.set_attention_slice("auto")
    unet.fuse_qkv_projections()
    assert list(linfusion.state_dict()) == [k for k in linfusion.state_dict() if "qkv" not in k]
    unet.unfuse_qkv_projections()
    unet.set_default_attn_processor()
    assert [k for k in unet.state_dict() if "attn2" not in k] == [
        k for k in keys if "attn2" not in k
    ]
    assert torch.allclose(tiny_models.predict(unet), linear, atol=1e-6)
