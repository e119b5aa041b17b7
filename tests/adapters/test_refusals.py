"""What LinFusion cannot do it refuses, in words, and the model is as it was."""

import subprocess
import sys

import pytest
import tiny_models
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0
from untouched import modules, untouched

from fbila import LinFusion
from fbila.adapters import AdapterError

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


class Pipeline:
    """Something with the attributes of a pipeline that has no UNet."""

    def __init__(self, **parts):
        vars(self).update(parts)


def test_nothing_to_swap():
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    there = modules(pixart)
    message = (
        "No attention module was swapped in PixArtTransformer2DModel. 4 were looked at: "
        "2 skipped (the bias of its projections would be lost; for example "
        "transformer_blocks.0.attn1), 2 skipped (cross-attention; for example "
        "transformer_blocks.0.attn2). "
        "Run fbila.adapters.plan(model) to see each reason."
    )
    for target in (pixart, Pipeline(unet=None, transformer=pixart)):
        with pytest.raises(AdapterError) as refusal:
            LinFusion.construct_for(target, load_pretrained=False)
        assert str(refusal.value) == message
    assert modules(pixart) == there


@pytest.mark.parametrize("thing", [None, {}, Pipeline(), Pipeline(unet=None)])
def test_no_unet(thing):
    message = "Expected an nn.Module or a DiffusionPipeline with .unet or .transformer, got "
    with pytest.raises(AdapterError, match=message + type(thing).__name__):
        LinFusion.construct_for(thing)


def test_no_weights_known(unet):
    with untouched(unet), pytest.raises(AdapterError) as refusal:
        LinFusion.construct_for(unet=unet)
    assert str(refusal.value) == (
        "No LinFusion weights are known for this UNet (cross_attention_dim=32, 6 spatial attn1). "
        "Pass pretrained_model_name_or_path=, or load_pretrained=False to start from the UNet's "
        "own weights."
    )


@pytest.mark.parametrize(
    ("other", "sizes"),
    [
        ({"block_out_channels": (64, 64)}, "6 modules of dims 64 and heads 2"),
        ({"attention_head_dim": 4}, "6 modules of dims {32,64} and heads 4"),
        (
            {"down_block_types": ("CrossAttnDownBlock2D",) * 2},
            "8 modules of dims {32,64} and heads 2",
        ),
    ],
)
def test_weights_for_another_unet(unet, tmp_path, other, sizes):
    config = LinFusion.get_default_config(unet=tiny_models.small_unet(**other))
    LinFusion(**config).save_pretrained(tmp_path)
    message = (
        f"This LinFusion checkpoint is for {sizes}; the UNet has 6 of dims {{32,64}} and heads 2. "
        "Nothing was mounted."
    )
    with untouched(unet), pytest.raises(AdapterError) as refusal:
        LinFusion.construct_for(unet=unet, pretrained_model_name_or_path=tmp_path)
    assert str(refusal.value).startswith(message)


def test_sequential_offload(unet):
    unet.to("meta")
    there = modules(unet)
    linfusion = LinFusion(**LinFusion.get_default_config(unet=unet))
    with pytest.raises(AdapterError, match="The model is under sequential CPU offload"):
        linfusion.mount_to(unet)
    assert modules(unet) == there


def test_a_quantised_layer_cannot_be_copied(unet):
    layer = unet.get_submodule(LAYER)
    layer.to_k.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), False)
    there = modules(unet)
    with pytest.raises(AdapterError, match=r"to_k is Linear with Tensor weights of torch\.uint8"):
        LinFusion.construct_for(unet=unet, load_pretrained=False)
    assert modules(unet) == there


def test_a_foreign_processor_makes_the_forward_pass_raise(unet):
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    linear = tiny_models.predict(unet)
    layer = unet.get_submodule(LAYER)
    parked = layer.processor
    layer.processor = PAGCFGIdentitySelfAttnProcessor2_0()  # as the PAG pipelines do
    message = (
        f"PAGCFGIdentitySelfAttnProcessor2_0 was set on {LAYER}, which runs linear attention and "
        "would ignore it."
    )
    with pytest.raises(AdapterError, match=message):
        tiny_models.predict(unet)
    with linfusion.disabled():
        tiny_models.predict(unet)
    layer.processor = parked
    assert torch.equal(tiny_models.predict(unet), linear)


def test_masks_and_other_keys_make_the_forward_pass_raise(unet):
    LinFusion.construct_for(unet=unet, load_pretrained=False)
    inputs = tiny_models.unet_inputs(unet)
    message = r"attention_mask \[2, 1, 256\] is no key mask of 64 tokens"
    with pytest.raises(AdapterError, match=message):
        tiny_models.predict(unet, **inputs, attention_mask=torch.ones(2, 256))
    tokens = torch.randn(1, 4, 64)
    with pytest.raises(AdapterError, match=r"encoder_hidden_states \[1, 4, 64\] was passed"):
        unet.get_submodule(LAYER)(tokens, encoder_hidden_states=tokens)


def test_arguments_meant_for_processors_are_mentioned(unet, caplog):
    LinFusion.construct_for(unet=unet, load_pretrained=False)
    layer, tokens = unet.get_submodule(LAYER), torch.randn(1, 4, 64)
    layer(tokens, ip_adapter_masks=None)
    assert not caplog.messages
    layer(tokens, height=2)
    assert caplog.messages == [f"{LAYER} ignores cross_attention_kwargs ['height']"]


def test_an_argument_that_would_be_ignored(unet, tmp_path):
    with untouched(unet), pytest.raises(AdapterError, match="mid_dim_scale is for load_pretrained"):
        LinFusion.construct_for(unet=unet, pretrained_model_name_or_path=tmp_path, mid_dim_scale=16)


def test_never_mounted(unet):
    linfusion = LinFusion(**LinFusion.get_default_config(unet=unet))
    assert not linfusion.mounted
    with linfusion.disabled():
        pass
    with pytest.raises(AdapterError, match="has not been mounted"):
        linfusion.unmount()


@pytest.mark.parametrize("access", ["fbila.LinFusion", "fbila.adapters.plan"])
def test_without_diffusers(access):
    code = f"import sys; sys.modules['diffusers'] = None; import fbila.adapters; {access}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: diffusers is not installed. Run: pip install fbila[diffusers]"
    )
    assert "The above exception was the direct cause" in ended.stderr


def test_with_a_broken_diffusers(tmp_path):
    package = tmp_path / "diffusers"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('torchvision does not match')")
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, sys.argv[1]); import fbila; fbila.LinFusion",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
    )
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: diffusers could not be imported (torchvision does not match). "
        "Run: pip install fbila[diffusers]"
    )
