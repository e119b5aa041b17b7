"""Layers whose projections `parts` takes apart: gradients are the same, and few are moved."""

import pytest
import torch
from helpers import DEVICE
from vision_contracts import randomize

from fbila import layers
from fbila.ops import centred_library, functional
from fbila.ops import parts as module
from fbila.ops.parts import put

# Each with how many gradients of parts are copied or added up.
LAYERS = {
    "linear": (lambda: layers.LinearAttention(16, 2), 0),
    "linear, norms": (lambda: layers.LinearAttention(16, 2, qk_norm=True), 2),
    "sana": (lambda: layers.SanaLinearAttention(16, 2), 0),
    "mlla": (lambda: layers.MLLALinearAttention(16, 2), 0),
    "vssd": (lambda: layers.NonCausalSSD(16, 2, d_state=8), 6),
    # The gradient of keys is summed over the batch as well, for that of the positions.
    "focused": (lambda: layers.FocusedLinearAttention(16, 2, grid_size=6), 2),
    "focused, keys": (lambda: layers.FocusedLinearAttention(16, 2, grid_size=6, sr_ratio=1), 2),
    "polaformer": (lambda: layers.PolaLinearAttention(16, 2, grid_size=6), 4),
    "polaformer, keys": (lambda: layers.PolaLinearAttention(16, 2, grid_size=6, sr_ratio=1), 4),
    "polaformer++": (lambda: layers.PolaPPAttention(16, 2), 4),
    "inline": (lambda: layers.InLineAttention(16, 2), 1),
    "inline, keys": (lambda: layers.InLineAttention(16, 2, sr_ratio=1), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients(name, monkeypatch):
    make, moved = LAYERS[name]
    layer = randomize(make()).to(DEVICE)
    for ops in (centred_library, functional):
        monkeypatch.setattr(ops, "choose_implementation", lambda *_: "triton")
    x = torch.randn(3, 36, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf).square().sum(), [leaf, *layer.parameters()])

    expected = gradients()
    copies = []

    def counted(*given):
        copies.append(given)
        return put(*given)

    monkeypatch.setattr(module, "FEWEST", 0)
    monkeypatch.setattr(module, "direct", module.ordinary)
    monkeypatch.setattr(module, "put", counted)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(copies) == moved
