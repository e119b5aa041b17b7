"""A small UNet, and its fused blocks run by their kernels, which are interpreted on the CPU."""

from collections import Counter
from contextlib import ExitStack

import pytest
import tiny_models
import torch
from helpers import CUDA

from fbila.adapters import fused_blocks, kernel_checks
from fbila.adapters.unet import block_forwards
from fbila.ops import (
    add_bias_library,
    geglu_library,
    group_norm_library,
    norm_library,
)

LIBRARIES = {
    "group_norm": group_norm_library,
    "add_bias": add_bias_library,
    "geglu": geglu_library,
    "layer_norm": norm_library,
}


@pytest.fixture
def kernels(monkeypatch):
    """Has the blocks run their kernels, through Triton's interpreter; counts the calls."""
    if CUDA:
        pytest.skip("kernels are not interpreted where there is a GPU")
    called = Counter()

    def counted(name):
        function = getattr(LIBRARIES[name], name)

        def run(*args, **kwargs):
            called[name] += 1
            return function(*args, **kwargs)

        return run

    for name, library in LIBRARIES.items():
        monkeypatch.setattr(block_forwards, name, counted(name))
        monkeypatch.setattr(library, "direct", lambda *tensors: True)
    monkeypatch.setattr(kernel_checks, "has_kernels", lambda x: True)
    return called


def tiny_unet(**changes):
    """Two residual blocks, of which one has a shortcut, and a transformer."""
    settings = {
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    }
    return tiny_models.small_unet(**{**settings, **changes})


def predict(unet, side=8, **inputs):
    return tiny_models.predict(unet, **tiny_models.unet_inputs(unet, side=side), **inputs)


def assert_near(actual, expected, atol=5e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def gradients_of(unet, leaves, fuse, **inputs):
    """Of a loss by leaves of the graph, in fused blocks or as the UNet comes."""
    with fused_blocks(unet) if fuse else ExitStack():
        loss = unet(**inputs).sample.square().mean()
        return torch.autograd.grad(loss, leaves)
