"""Swin's block over the grid computes what timm's does, which takes the grid apart."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from fbila.models.window_block import WindowBlock


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 12), (8, 10), (5, 8), (6, 7)])
def test_it_answers_as_timms(size, shift):
    """Windows of 4 x 4, which some grids fill and others do not."""
    torch.manual_seed(0)
    options = {"window_size": 4, "shift_size": shift}
    theirs = SwinTransformerBlock(16, size, 2, dynamic_mask=True, **options).double()
    for p in theirs.parameters():
        # Biases too, which stand for what is beyond the grid.
        torch.nn.init.normal_(p, std=0.5)
    ours = WindowBlock(16, size, 2, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x, dy = torch.randn(2, 3, *size, 16, dtype=torch.float64)
    results = []
    for block in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        results.append((y, *torch.autograd.grad(y, [leaf, *block.parameters()], dy)))
    torch.testing.assert_close(*results)
