"""What compilers, exports and transforms see of fused blocks."""

import pytest
import tiny_models
import torch
from block_kernels import assert_near, predict, tiny_unet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fbila.adapters import fused_blocks
from fbila.ops import (
    autograd,
    group_norm_library,
    group_sizes,
)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "forward_ad"])
def test_transforms_take_the_stock_blocks(kernels, transform):
    unet = tiny_unet().requires_grad_(False)
    block = unet.down_blocks[1].resnets[0]
    x, temb = torch.randn(2, 16, 6, 6), torch.randn(2, 64)

    def run():
        def apply(x):
            return block(x, temb)

        if transform == "vmap":
            return torch.func.vmap(lambda x: block(x, temb))(x.expand(3, *x.shape))
        if transform == "grad":
            return torch.func.grad(lambda x: apply(x).square().sum())(x)
        if transform == "jvp":
            return torch.func.jvp(apply, (x,), (x,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(apply(dual)).tangent

    expected = run()
    with fused_blocks(unet):
        assert torch.equal(run(), expected)
    assert not kernels


@pytest.mark.parametrize("by", ["compile", "repeated blocks", "export", "trace"])
def test_compiled_it_is_as_it_comes(kernels, by):
    torch._dynamo.reset()
    unet = tiny_unet()
    expected = predict(unet)
    fused_blocks(unet)
    counter = CompileCounterWithBackend("eager")
    if by == "compile":
        compiled = torch.compile(unet, backend=counter, fullgraph=True)
        assert torch.equal(predict(compiled), expected)
        assert counter.frame_count == 1
        assert not kernels
    elif by == "repeated blocks":
        unet.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert_near(predict(unet), expected)
        assert counter.frame_count == 1
        # What is inside the block is compiled, the rest is fused.
        assert set(kernels) == {"group_norm", "add_bias"}
    else:
        inputs = tuple(tiny_models.unet_inputs(unet, side=8).values())
        with torch.no_grad():
            if by == "export":
                actual = torch.export.export(Positional(unet), inputs).module()(*inputs)
            else:
                actual = torch.jit.trace(Positional(unet), inputs, check_trace=False)(*inputs)
        assert torch.equal(actual, expected)
        assert not kernels


def test_compiled_it_keeps_the_kernels_of_long_norms(kernels, monkeypatch):
    torch._dynamo.reset()
    unet = tiny_unet()
    expected = predict(unet)
    fused_blocks(unet)
    # A channel has 64 positions at first and 4 in the end, and groups have 1 to 4 channels.
    monkeypatch.setattr(group_sizes, "LONGEST", 63)
    monkeypatch.setattr(group_norm_library, "direct", autograd.direct)
    called = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    actual = predict(torch.compile(unet, backend=backend, fullgraph=True))
    assert_near(actual, expected)
    assert 0 < sum("fbila.group_norm" in name for name in called) < 31
    assert not any(
        op in name for name in called for op in ("add_bias", "geglu", "fbila.layer_norm")
    )


class Positional(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, *inputs):
        return self.unet(*inputs, return_dict=False)[0]
