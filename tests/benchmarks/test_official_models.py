"""Whole models by official operations: the same answers, and by nothing that is ours."""

from contextlib import nullcontext

import pytest
import timm
import torch

from benchmarks.vision.official import official
from fbila.layers import depthwise_conv, focused, over_tokens, polaformer, rala
from fbila.layers import mlla as mlla_layer
from fbila.models import casting, mlla, window_block

NAMES = ["mlla_tiny", "ravlt_tiny", "flatten_swin_tiny", "polaformer_swin_tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_official_models_have_none_of_our_operations(name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("ours")

    for module, function in (
        (over_tokens, "depthwise_conv"),
        (over_tokens, "linear"),
        (depthwise_conv, "depthwise_conv"),
        (window_block, "window_attention"),
        (mlla, "silu_gate"),
        (mlla_layer, "linear_attn"),
        (rala, "linear_attn"),
        (focused, "focused_la"),
        (polaformer, "linear_attn"),
    ):
        monkeypatch.setattr(module, function, refuse)
    # It may be asked, but there is nothing for it to cast.
    monkeypatch.setattr(
        casting, "cast_together", lambda x, found: refuse() if found else nullcontext()
    )
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), official(model), torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    with torch.no_grad(), pytest.raises(AssertionError, match="ours"):
        model(x)


@pytest.mark.parametrize("name", NAMES)
def test_official_models_are_one_graph(name):
    """As their authors' code is: with more of them, the compiler would do worse than it can."""
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), official(model):
        expected = model(x)
        actual = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(actual, expected)
    torch.compiler.reset()


def test_official_windows_are_the_models():
    """On grids of 5 x 7, which shifted windows of 2 x 2 do not fill."""
    small = {"window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_classes": 5}
    model = timm.create_model("flatten_swin_tiny", img_size=(80, 112), **small).double().eval()
    for name, p in model.named_parameters():
        # Tables and biases that do something.
        if name.endswith("table") or p.ndim == 1:
            torch.nn.init.normal_(p)
    x = torch.randn(2, 3, 80, 112, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        with official(model):
            torch.testing.assert_close(model(x), expected)
