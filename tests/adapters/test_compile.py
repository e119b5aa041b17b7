"""A UNet with LinFusion compiles and exports as the same UNet with softmax attention does."""

import functools
import os
import shutil

import pytest
import tiny_models
import torch
from helpers import CUDA
from test_fuse import mount
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from fbila import linear_attn

# The second changes both sides of the latents, so that both are dynamic from then on.
SIZES = [(8, 8), (12, 16), (16, 12), (20, 20)]
CPP_COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")

first = pytest.mark.parametrize("first", ["softmax", "linear"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def unet():
    """Two attn1, of 32 and of 64 channels; the compiler takes its time over every layer."""
    return tiny_models.small_unet(
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.fixture
def use_kernels(monkeypatch):
    """Has the layers run the op that they run on a GPU, through Triton's interpreter."""
    if CUDA:
        pytest.skip("kernels are not interpreted where there is a GPU")
    name = "fbila.layers.linfusion.linear_attn"
    return lambda: monkeypatch.setattr(name, functools.partial(linear_attn, impl="triton"))


def inputs_of(unet, size, seed=1) -> dict:
    sample = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(seed))
    return {**tiny_models.unet_inputs(unet), "sample": sample}


def answers(model, sizes=SIZES) -> list:
    return [tiny_models.predict(model, **inputs_of(model, size)) for size in sizes]


def assert_near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def calls(graph, name) -> int:
    return sum(name in str(node.target) for node in graph.graph.nodes)


def whole(unet, backend):
    return torch.compile(unet, backend=backend, fullgraph=True)


def blocks(unet, backend):
    unet.compile_repeated_blocks(backend=backend, fullgraph=True)
    return unet


def graphs_of_four_turns(unet, compiled_by, first) -> list[int]:
    """How many graphs there are after softmax attention and LinFusion took turns, exactly."""
    linfusion = mount(unet)
    expected = {"linear": answers(unet)}
    linfusion.unmount()
    expected["softmax"] = answers(unet)
    assert not torch.allclose(expected["linear"][0], expected["softmax"][0], atol=1e-3)
    if first == "linear":
        linfusion.mount_to(unet=unet)
    counter = CompileCounterWithBackend("eager")
    compiled = compiled_by(unet, counter)
    graphs = []
    for attention in sorted(expected, reverse=first == "softmax") * 2:
        if attention == "linear":
            linfusion.mount_to(unet=unet)
        else:
            linfusion.unmount()
        for actual, answer in zip(answers(compiled), expected[attention], strict=True):
            assert torch.equal(actual, answer)
        graphs.append(counter.frame_count)
    linfusion.unmount()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(answers(unet)[0], expected["softmax"][0])
    return graphs


@first
def test_four_resolutions_are_two_graphs(unet, first):
    # Whichever comes second is compiled for any resolution at once.
    assert graphs_of_four_turns(unet, whole, first) == [2, 3, 3, 3]


@first
def test_six_blocks_of_two_widths_share_graphs(first):
    # One width is seen at its first resolution before it is compiled for any.
    assert graphs_of_four_turns(tiny_models.small_unet(), blocks, first) == [3, 5, 5, 5]


def test_kernels_are_one_operator_each_at_any_resolution(unet, use_kernels):
    mount(unet).fuse()
    expected = answers(unet, SIZES[:3])
    use_kernels()
    counter = CompileCounterWithBackend("eager")
    compiled = whole(unet, counter)
    for actual, answer in zip(answers(compiled, SIZES[:3]), expected, strict=True):
        assert_near(actual, answer)
    assert counter.frame_count == 2
    for graph in counter.graphs:
        assert calls(graph, "fbila.linear_attn") == calls(graph, "fbila.layer_norm") == 2


def test_a_foreign_processor_raises_when_compiled(unet):
    mount(unet)
    unet.compile_repeated_blocks(backend="eager")
    tiny_models.predict(unet)
    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.processor = object()
    with pytest.raises(Exception, match="would ignore it"):
        tiny_models.predict(unet)


def test_compiled_blocks_train_alike(unet, use_kernels):
    linfusion = mount(unet)
    unet.train()
    gradients = []
    for compiled in (False, True):
        if compiled:
            use_kernels()
            blocks(unet, "aot_eager").enable_gradient_checkpointing()
        loss = unet(**inputs_of(unet, SIZES[1])).sample.square().mean()
        gradients.append(torch.autograd.grad(loss, list(linfusion.parameters())))
    for eager, compiled in zip(*gradients, strict=True):
        assert eager.any()
        assert (compiled - eager).norm() <= 1e-4 * eager.norm()


@pytest.mark.skipif(not CPP_COMPILER, reason="needs a C++ compiler")
def test_a_block_by_inductor(unet):
    mount(unet)
    expected = tiny_models.predict(unet)
    unet.down_blocks[0].attentions[0].transformer_blocks[0].compile(fullgraph=True)
    assert_near(tiny_models.predict(unet), expected, atol=1e-4)
    assert counters["inductor"]


class Positional(nn.Module):
    """A UNet as `torch.export` takes it."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, text):
        return self.unet(sample, timestep, text, return_dict=False)[0]


def test_one_export_serves_every_resolution(unet):
    mount(unet)
    model = Positional(unet)
    any_side = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    example = tuple(inputs_of(unet, SIZES[1]).values())
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=(any_side, None, None))
        for size in SIZES:
            inputs = tuple(inputs_of(unet, size, seed=2).values())
            assert_near(program.module()(*inputs), model(*inputs))


def test_kernels_are_one_operator_each_in_an_export(unet, use_kernels):
    mount(unet).fuse()
    model, inputs = Positional(unet), tuple(inputs_of(unet, SIZES[0]).values())
    with torch.no_grad():
        expected = model(*inputs)
        use_kernels()
        program = torch.export.export(model, inputs)
        assert calls(program, "fbila.linear_attn") == calls(program, "fbila.layer_norm") == 2
        assert_near(program.module()(*inputs), expected)
