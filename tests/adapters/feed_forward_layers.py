"""Feed-forward layers of diffusers' linear models, and models run by kernels, which are counted.

On a CPU the kernels run through Triton's interpreter.
"""

from collections import Counter

import pytest
import torch
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.transformers.transformer_sana_video import GLUMBTempConv
from helpers import CUDA, DEVICE
from torch import Tensor, nn

from fbila.adapters import kernel_checks
from fbila.adapters.acceleration import gated_convolutions, inference
from fbila.ops import functional, gated_conv_library, repeated, rms_norm_library

LIBRARIES = {
    "gated_depthwise_conv": (gated_convolutions, gated_conv_library),
    "rms_norm": (inference, rms_norm_library),
}


@pytest.fixture
def kernels(monkeypatch):
    """Has the models run their kernels; counts the calls."""
    called = Counter()

    def counted(name, function):
        def run(*args):
            called[name] += 1
            return function(*args)

        return run

    for name, (user, library) in LIBRARIES.items():
        monkeypatch.setattr(user, name, counted(name, getattr(library, name)))
        if not CUDA:
            monkeypatch.setattr(library, "direct", lambda *_: True)
    if not CUDA:
        monkeypatch.setattr(kernel_checks, "has_kernels", lambda _: True)
    monkeypatch.setattr(functional, "choose_implementation", lambda *_: "triton")
    monkeypatch.setattr(repeated, "_PASSED", {})
    return called


class Holder(nn.Module):
    """A model of one feed-forward layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def hold(kind: type[nn.Module], **options) -> Holder:
    torch.manual_seed(0)
    model = Holder(kind(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(DEVICE)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


_SANA = {"in_channels": 24, "out_channels": 24, "expand_ratio": 2.5, "residual_connection": False}
_DC_AE = {"in_channels": 16, "out_channels": 16, "norm_type": "rms_norm"}
LAYERS = {
    "Sana": (lambda: hold(GLUMBConv, **_SANA), normal(2, 24, 9, 10)),
    "other channels": (
        lambda: hold(GLUMBConv, **{**_SANA, "out_channels": 20}), normal(1, 24, 3, 5),
    ),
    "DC-AE": (lambda: hold(GLUMBConv, **_DC_AE), normal(2, 16, 7, 12)),
    "SanaVideo": (lambda: hold(GLUMBTempConv, **_SANA), normal(2, 3, 4, 6, 24)),
    "SanaVideo, residual": (
        lambda: hold(GLUMBTempConv, in_channels=8, out_channels=8), normal(1, 2, 3, 5, 8),
    ),
}  # fmt: skip
each_layer = pytest.mark.parametrize("name", LAYERS)
