"""On a GPU a UNet with LinFusion runs from CUDA graphs, captured by hand or by torch.compile."""

import pytest
import tiny_models
import torch
from helpers import CUDA
from test_fuse import mount
from torch._dynamo.utils import counters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")]


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def mounted(unet, request):
    """The UNet in float16."""
    unet.to("cuda", torch.float16)
    linfusion = mount(unet)
    if request.param:
        linfusion.fuse()
    return unet


def inputs_of(unet, side, seed) -> dict:
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"generator": generator, "device": "cuda", "dtype": torch.float16}
    return {
        "sample": torch.randn(2, 4, side, side, **options),
        "timestep": torch.tensor(100 * seed, device="cuda"),
        "encoder_hidden_states": torch.randn(2, 7, unet.config.cross_attention_dim, **options),
    }


def assert_near(actual, expected):
    assert expected.isfinite().all()
    bound = 1e-2 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


# 256 tokens are for one kernel, 4096 for two.
@pytest.mark.parametrize("side", [16, 64])
def test_captured(mounted, side):
    inputs = inputs_of(mounted, side, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            tiny_models.predict(mounted, **inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tiny_models.predict(mounted, **inputs)
    for seed in (2, 3):
        others = inputs_of(mounted, side, seed)
        for name, other in others.items():
            inputs[name].copy_(other)
        graph.replay()
        assert_near(captured, tiny_models.predict(mounted, **others))


def test_compiled_with_reduced_overhead(mounted):
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(mounted, mode="reduce-overhead", fullgraph=True)
    # The first call warms up, the second is recorded, the others are replayed.
    for seed in range(1, 5):
        inputs = inputs_of(mounted, 64, seed)
        expected = tiny_models.predict(mounted, **inputs)
        torch.compiler.cudagraph_mark_step_begin()
        assert_near(tiny_models.predict(compiled, **inputs), expected)
    assert counters["inductor"]["cudagraph_skips"] == 0
