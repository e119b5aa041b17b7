"""What cannot be swapped in timm's models is told, and they are as they were."""

import re
import subprocess
import sys

import backbones
import pytest
import timm
import torch
from helpers import DEVICE
from timm.layers import Attention
from torch import nn
from untouched import modules

from fbila.adapters import AdapterError
from fbila.adapters.timm import LinearAttention, plan, swap


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(AdapterError) as error:
        call(*args, **kwargs)
    return str(error.value)


@pytest.fixture
def model():
    return backbones.vit()


def on_meta(name: str) -> nn.Module:
    return timm.create_model(name, device="meta")


REASONS = {
    "beit_base_patch16_224": ("Attention", "has a position bias on pairs of tokens"),
    "swin_tiny_patch4_window7_224": (
        "WindowAttention",
        "attends within windows, with a position bias on pairs of tokens",
    ),
    "swinv2_tiny_window8_256": (
        "WindowAttention",
        "attends within windows, by the cosine of queries and keys and a position bias",
    ),
    "cait_xxs24_224": ("TalkingHeadAttn", "mixes the logits of its heads (talking heads)"),
    "vit_huge_patch14_xp_224": (
        "ParallelScalingBlock",
        "computes attention within the block, where there is no module to replace",
    ),
    "convit_tiny": (
        "GPSA",
        "gates softmax with a position bias on pairs of tokens",
    ),
    "vit_dlittle_patch16_reg1_gap_256": (
        "DiffAttention",
        "is the difference of two softmax attentions",
    ),
    "xcit_nano_12_p16_224": ("XCA", "attends over channels, and is linear in the tokens already"),
    "efficientvit_b0": ("LiteMLA", "is linear in the tokens already"),
    "coat_lite_tiny": ("FactorAttnConvRelPosEnc", "is linear in the tokens already"),
    "pvt_v2_b0": ("Attention", "has its keys reduced to few tokens already"),
    "hiera_tiny_224": (
        "MaskUnitAttention",
        "attends within windows or mask units, with pooled queries",
    ),
    "visformer_tiny": (
        "Attention",
        "takes its tokens as a picture, not as (batch, tokens, channels)",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_nothing_to_swap(name):
    model = on_meta(name)
    there = modules(model)
    source, reason = REASONS[name]
    entries = plan(model).skipped
    entry = next(e for e in entries if e.reason == reason)
    assert (entry.source, entry.target) == (source, "")
    words = refusal(swap, model)
    assert words.startswith(
        f"No attention module was swapped in {type(model).__name__}. {len(entries)} were looked "
        "at: "
    )
    assert f"skipped ({reason}; for example {entry.name})" in words
    assert words.endswith(". Run fbila.adapters.timm.plan(model) to see each reason.")
    assert modules(model) == there


def test_no_attention_at_all():
    assert refusal(swap, on_meta("resnet18")) == (
        "No attention module was swapped in ResNet. 0 were looked at. Run "
        "fbila.adapters.timm.plan(model) to see each reason."
    )


@pytest.mark.parametrize("thing", [None, {}, "vit_base_patch16_224"])
def test_no_model(thing):
    for call in (swap, plan):
        message = f"Expected an nn.Module, got {type(thing).__name__}."
        assert refusal(call, thing) == message


@pytest.mark.parametrize("attention", ["softmax", None, 3, "linear"])
def test_no_such_attention(model, attention):
    assert refusal(swap, model, attention) == (
        "attention must be a layer class, a factory or one of 'elu1', 'relu', 'relu_offset', "
        f"'exp', 'signed', got {attention!r}."
    )


def test_filters_that_leave_nothing(model):
    there = modules(model)
    words = refusal(swap, model, include=r"blocks\.9\..*")
    assert words == (
        "No attention module was swapped in VisionTransformer. 3 were looked at: 3 skipped (does "
        r"not match include='blocks\\.9\\..*'; for example blocks.0.attn). Run "
        "fbila.adapters.timm.plan(model) to see each reason."
    )
    assert "3 skipped (matches exclude=['attn']; " in refusal(swap, model, exclude=["attn"])
    assert "3 skipped (not among layers=[]; " in refusal(swap, model, layers=[])
    assert refusal(swap, model, layers=[0, 3]) == (
        "layers=[0, 3] asks for [3], but 3 modules are left to choose from."
    )
    assert modules(model) == there


def test_a_second_swap(model):
    handle = swap(model)
    there = modules(model)
    assert refusal(swap, model) == (
        "VisionTransformer carries a swap already. Undo it first: handle.unmount(), or "
        "fbila.adapters.unswap(model)."
    )
    assert modules(model) == there
    assert plan(model).reasons() == {"is linear attention already": 3}
    handle.unmount()
    swap(model)


def test_a_model_made_linear():
    model = timm.create_model("test_vit", attn_layer=LinearAttention)
    assert "6 skipped (is linear attention already; " in refusal(swap, model)


def test_a_layer_alone():
    layer = Attention(32)
    words = "is the model itself, and nothing around it could hold another module"
    assert words in refusal(swap, layer)


def test_a_class_of_ones_own(model):
    class ForkedAttention(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x

    model.blocks[0].attn = ForkedAttention(32)
    report = swap(model).report
    assert [(e.name, e.source, e.reason) for e in report.skipped] == [
        (
            "blocks.0.attn",
            "ForkedAttention",
            "is not exactly timm's Attention, AttentionRope or EvaAttention",
        )
    ]
    assert len(report.swapped) == 2


def test_too_many_features():
    model = backbones.vit(embed_dim=520, num_heads=2)
    assert "3 skipped (has 260 features a head, more than 256; " in refusal(swap, model)
    model = backbones.vit(embed_dim=260, num_heads=2)
    assert "(has 260 features a head, more than 256; " in refusal(swap, model, "signed")
    swap(model)


def test_features_that_rotary_does_not_fit():
    words = "has a rotary position embedding, which the features of 'signed' do not fit"
    assert words in refusal(swap, backbones.eva(), "signed")
    swap(backbones.vit(), "signed")
    swap(backbones.eva(use_rot_pos_emb=False), "signed")


def test_a_forward_that_somebody_put_on(model):
    layer = model.blocks[0].attn
    layer.forward = layer.forward
    assert [e.reason for e in plan(model).skipped] == [
        "had its forward replaced, as accelerate's hooks do, which would be lost"
    ]
    del layer.forward
    handle = swap(model)
    there = modules(model)
    layer = model.blocks[0].attn
    layer.forward = layer.forward
    assert refusal(handle.unmount).startswith("The forward of blocks.0.attn was replaced")
    assert modules(model) == there
    del layer.forward
    handle.unmount()


def test_one_that_was_compiled_by_itself(model):
    """It would go on with softmax: what was compiled is the forward of the module itself."""
    model.blocks[0].attn.compile(backend="eager")
    handle = swap(model)
    assert [(e.name, e.reason) for e in handle.report.skipped] == [
        ("blocks.0.attn", "was compiled by itself; compile it afterwards")
    ]
    linear = handle.modules["blocks.1.attn"]
    x = torch.randn(2, 17, 32, device=DEVICE)
    expected = linear(x)
    linear.compile(backend="eager")
    torch.testing.assert_close(linear(x), expected)
    handle.unmount()
    assert not torch.allclose(model.blocks[1].attn(x), expected, atol=1e-3)


def test_the_report_in_words(model):
    lines = str(swap(model, layers=[0, -1]).report).splitlines()
    assert lines[0] == "VisionTransformer: 2 swapped, 1 skipped"
    assert re.fullmatch(r"  blocks.0.attn  2 x 16  Attention -> LinearAttention", lines[1])
    assert re.fullmatch(r"  blocks.1.attn  2 x 16  skipped: not among layers=\[0, -1\]", lines[3])


def test_without_timm():
    code = "import sys; sys.modules['timm'] = None; import fbila.adapters.timm"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: timm is not installed. Run: pip install fbila[timm]"
    )


def test_with_an_old_timm():
    code = (
        "import timm, timm.layers\n"
        "class Old(timm.layers.AttentionRope):\n"
        "    def __init__(self, dim): pass\n"
        "timm.__version__, timm.layers.AttentionRope = '1.0.20', Old\n"
        "import fbila.adapters.timm"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == (
        "ImportError: timm could not be imported (timm 1.0.20 is older than 1.0.31). Run: pip "
        "install fbila[timm]"
    )


def test_diffusers_is_not_needed():
    code = (
        "import sys; sys.modules['diffusers'] = None; import timm, fbila.adapters.timm as adapter; "
        "print(len(adapter.swap(timm.create_model('test_vit')).report.swapped))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "6", ended.stderr


def test_torch_is_still_the_same():
    before = torch.nn.functional.scaled_dot_product_attention
    swap(backbones.vit())
    assert torch.nn.functional.scaled_dot_product_attention is before
