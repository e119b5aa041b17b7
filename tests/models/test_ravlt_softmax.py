"""RAVLT's softmax attention: its values, and gradients that no call before it can spoil.

PyTorch 2.11 looks up the plan of cuDNN's backward pass by the strides of q, k and v alone, and a
plan reads the gradient of the output as it lay when the plan was made.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from helpers import CUDA, DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel

from fbila.layers import over_tokens
from fbila.models.ravlt_block import RAVLTBlock, SoftmaxPictureAttention
from fbila.ops import rotated_parts
from fbila.ops.autograd import ordinary


class ChannelsFirst(SoftmaxPictureAttention):
    """Its gradient comes in another memory order, as where other operations are around it."""

    def mix(self, *inputs):
        out = super().mix(*inputs)
        out.register_hook(lambda gradient: gradient.mT.contiguous().mT)
        return out


def the_operator(*tensors):
    """What there is on a GPU, where no kernel runs."""
    return torch.ops.fbila.depthwise_conv(*tensors, False, False, False)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("grid", [(6, 5), (1, 7), (4, 1)])
def test_memory_order(grid, operator, kernel, monkeypatch):
    seen = {}
    attention = F.scaled_dot_product_attention

    def watched(q, k, v):
        seen.update(q=q, k=k, v=v, o=attention(q, k, v))
        seen["o"].register_hook(lambda gradient: seen.update(gradient=gradient))
        return seen["o"]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    if operator:
        monkeypatch.setattr(over_tokens, "depthwise_conv", the_operator)
    monkeypatch.setattr(rotated_parts, "direct", ordinary if kernel else lambda *_: False)
    layer = SoftmaxPictureAttention(24, 3, device=DEVICE)
    x = torch.randn(2, 24, *grid, device=DEVICE).to(memory_format=torch.channels_last)
    y = layer(x.requires_grad_())
    y.backward(torch.randn_like(y))
    assert y.is_contiguous(memory_format=torch.channels_last)
    for name in ("q", "k", "o", "gradient"):
        assert seen[name].transpose(1, 2).is_contiguous(), name
    # The values are read where the projection wrote them.
    assert seen["v"].transpose(1, 2).stride() == (24 * 4 * grid[0] * grid[1], 24 * 4, 8, 1)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_values(order):
    """Of rotated queries and keys, wherever the picture lies."""
    H, W, C, heads = 3, 4, 16, 2
    layer = SoftmaxPictureAttention(C, heads, dtype=torch.float64)
    x = torch.randn(2, C, H, W, dtype=torch.float64).to(memory_format=order)
    cos, sin, _ = layer.rope(H, W, x)
    q, k, v, gate = layer.qkvo(x).flatten(2).mT.unflatten(-1, (4, heads, -1)).unbind(2)
    turn = torch.complex(cos, sin)[:, None]
    q, k = (
        torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn)
        for t in (q, k)
    )
    weights = torch.einsum("bnhij,bmhij->bhnm", q, k) * (C // heads) ** -0.5
    out = torch.einsum("bhnm,bmhd->bhdn", weights.softmax(-1), v)
    values, gate = (t.flatten(2).mT.unflatten(2, (H, W)) for t in (v, gate))
    expected = layer.proj((layer.lepe(values) + out.flatten(1, 2).unflatten(2, (H, W))) * gate)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("side", "heads"), [(14, 5), (7, 8)])
def test_bfloat16_gradients(side, heads, batch):
    expected = gradients(SoftmaxPictureAttention, heads, side, batch)
    for kind in (ChannelsFirst, SoftmaxPictureAttention):
        for name, found in gradients(kind, heads, side, batch, torch.bfloat16).items():
            error = (found - expected[name]).norm() / expected[name].norm()
            assert error < 0.03, (kind.__name__, name, float(error))


def gradients(kind, heads, side, batch, dtype=None):
    """By the picture and the parameters, under autocast to `dtype` or in float32 by formulas."""
    torch.manual_seed(0)
    layer = kind(64 * heads, heads, device=DEVICE)
    x, dy = (
        t.contiguous(memory_format=torch.channels_last)
        for t in torch.randn(2, batch, 64 * heads, side, side, device=DEVICE)
    )
    x.requires_grad_()
    exactly = sdpa_kernel(SDPBackend.MATH) if dtype is None else nullcontext()
    with exactly, torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        y = layer(x)
    y.backward(dy.to(y.dtype))
    return {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
def test_branches_are_scaled(drop_path, training, dropping):
    torch.manual_seed(0)
    attn = SoftmaxPictureAttention(16, 2, dtype=torch.float64)
    block = RAVLTBlock(attn, 16, 2.0, 0.5, drop_path=drop_path, dtype=torch.float64)
    block.train(training)
    block.drop_path.train(dropping)
    x = torch.randn(3, 4, 5, 16, dtype=torch.float64)
    rotary = attn.rope(4, 5, x)
    torch.manual_seed(1)
    y = block(x, rotary)

    def attend(x):
        return attn(x.permute(0, 3, 1, 2), rotary).permute(0, 2, 3, 1)

    def branch(module, norm, gamma, x):
        return x + block.drop_path(gamma.flatten() * module(norm(x)))

    torch.manual_seed(1)
    x = x + block.pos(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    x = branch(attend, block.norm1, block.gamma_1, x)
    torch.testing.assert_close(y, branch(block.ffn, block.norm2, block.gamma_2, x))
