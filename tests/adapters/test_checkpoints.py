"""LinFusion reads and writes the checkpoints of the paper's code."""

import json

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from untouched import untouched

from fbila import LinFusion
from fbila.adapters import AdapterError

MODULES = (
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", 32),
    ("down_blocks.0.attentions.1.transformer_blocks.0.attn1", 32),
    ("up_blocks.1.attentions.0.transformer_blocks.0.attn1", 32),
    ("up_blocks.1.attentions.1.transformer_blocks.0.attn1", 32),
    ("up_blocks.1.attentions.2.transformer_blocks.0.attn1", 32),
    ("mid_block.attentions.0.transformer_blocks.0.attn1", 64),
)
# The published format. It must never change.
KEYS = (
    "to_q.weight",
    "to_k.weight",
    "to_v.weight",
    "to_out.0.weight",
    "to_out.0.bias",
    "to_q_.0.weight",
    "to_q_.0.bias",
    "to_q_.1.weight",
    "to_q_.1.bias",
    "to_q_.3.weight",
    "to_q_.3.bias",
    "to_k_.0.weight",
    "to_k_.0.bias",
    "to_k_.1.weight",
    "to_k_.1.bias",
    "to_k_.3.weight",
    "to_k_.3.bias",
)


def tensors(mid_dim_scale: int = 1) -> dict[str, torch.Tensor]:
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for index, (_, dim) in enumerate(MODULES):
        mid = dim // mid_dim_scale
        for key in KEYS:
            place = key.split(".")
            if place[0] in ("to_q_", "to_k_") and place[1] in "01":
                shape = (mid, dim) if key.endswith("0.weight") else (mid,)
            elif place[0] in ("to_q_", "to_k_"):
                shape = (dim, mid) if key.endswith("weight") else (dim,)
            else:
                shape = (dim, dim) if key.endswith("weight") else (dim,)
            found[f"{index}.{key}"] = torch.randn(shape, generator=generator) / mid**0.5
    return found


def write_published(folder, weights, mid_dim_scale=None):
    """A checkpoint as the paper's code writes it, without fbila's help."""
    modules_list = [
        {
            "module_name": name,
            "dim_n": dim,
            "heads": 2,
            "projection_mid_dim": dim // mid_dim_scale if mid_dim_scale else None,
        }
        for name, dim in MODULES
    ]
    folder.mkdir(exist_ok=True)
    config = {"_class_name": "LinFusion", "modules_list": modules_list}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("mid_dim_scale", [None, 16])
def test_a_published_checkpoint_loads(unet, tmp_path, mid_dim_scale):
    weights = tensors(mid_dim_scale or 1)
    write_published(tmp_path, weights, mid_dim_scale)
    linfusion = LinFusion.construct_for(unet=unet, pretrained_model_name_or_path=tmp_path)
    assert list(linfusion.state_dict()) == [f"{i}.{key}" for i in range(6) for key in KEYS]
    for name, tensor in linfusion.state_dict().items():
        assert torch.equal(tensor, weights[name])
    for index, (name, _) in enumerate(MODULES):
        layer = unet.get_submodule(name)
        assert layer is linfusion.layers[index]
        assert torch.equal(layer.to_q_[3].weight, weights[f"{index}.to_q_.3.weight"])
    assert tiny_models.predict(unet).isfinite().all()


@pytest.mark.parametrize("mounted", [True, False])
def test_what_is_saved_is_the_published_format(unet, tmp_path, mounted):
    weights = tensors()
    write_published(tmp_path / "published", weights)
    linfusion = LinFusion.construct_for(
        unet=unet, pretrained_model_name_or_path=tmp_path / "published"
    )
    linear = tiny_models.predict(unet)
    if not mounted:
        linfusion.unmount()
    linfusion.save_pretrained(tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    assert sorted(saved) == sorted(weights)
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    configs = [
        json.loads((tmp_path / w / "config.json").read_text()) for w in ("published", "ours")
    ]
    assert configs[0]["modules_list"] == configs[1]["modules_list"]
    assert configs[1]["_class_name"] == "LinFusion"
    linfusion.unmount()
    LinFusion.from_pretrained(tmp_path / "ours").mount_to(unet)
    assert torch.equal(tiny_models.predict(unet), linear)


def test_half_precision_variant(unet, tmp_path):
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    linfusion.unmount()
    for layer in linfusion.layers:
        layer.half()
    linfusion.save_pretrained(tmp_path, variant="fp16")
    assert [f.name for f in tmp_path.glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    again = LinFusion.construct_for(
        unet=unet, pretrained_model_name_or_path=tmp_path, variant="fp16"
    )
    assert {p.dtype for p in again.parameters()} == {torch.float32}  # the UNet's
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, linfusion.state_dict()[name].float())


def test_shards(unet, tmp_path):
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    linfusion.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = LinFusion.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, linfusion.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("3.to_k_.1.bias"), "missing keys ['3.to_k_.1.bias']"),
        (lambda w: w.update(strange=torch.ones(1)), "unexpected keys ['strange']"),
    ],
)
def test_an_incomplete_checkpoint(unet, tmp_path, change, words):
    weights = tensors()
    change(weights)
    write_published(tmp_path, weights)
    with untouched(unet), pytest.raises(AdapterError) as refusal:
        LinFusion.construct_for(unet=unet, pretrained_model_name_or_path=tmp_path)
    assert f"no complete LinFusion checkpoint: {words}" in str(refusal.value)


def test_a_corrupt_file(unet, tmp_path):
    write_published(tmp_path, tensors())
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    with untouched(unet), pytest.raises(Exception, match=r".+"):
        LinFusion.construct_for(unet=unet, pretrained_model_name_or_path=tmp_path)


def test_a_part_of_the_layers(unet, tmp_path):
    config = LinFusion.get_default_config(unet=unet)
    config["modules_list"] = config["modules_list"][2:4]
    with untouched(unet):
        linfusion = LinFusion(**config)
        report = linfusion.mount_to(unet)
        assert [entry.name for entry in report.swapped] == [MODULES[2][0], MODULES[3][0]]
        assert report.reasons()["not in this LinFusion's modules_list"] == 4
        linfusion.unmount()


def test_weights_beside_the_pipeline_are_found(pipeline_folder, tmp_path):
    weights = tensors()
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.save_pretrained(tmp_path)
    write_published(tmp_path / "linfusion", weights)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    for arguments in ({"pipeline": pipeline}, {"unet": pipeline.unet}):
        linfusion = LinFusion.construct_for(**arguments)
        assert torch.equal(linfusion.layers[0].to_q.weight, weights["0.to_q.weight"])
        linfusion.unmount()
    elsewhere = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    elsewhere.unet = tiny_models.small_unet()
    with untouched(elsewhere.unet), pytest.raises(AdapterError, match="No LinFusion weights"):
        LinFusion.construct_for(elsewhere)
    linfusion = LinFusion.construct_for(elsewhere, pipe_name_path=tmp_path)
    assert torch.equal(linfusion.layers[0].to_q.weight, weights["0.to_q.weight"])
