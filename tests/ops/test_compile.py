"""torch.compile takes the public functions whole, once for all lengths."""

import pytest
import torch
from helpers import CUDA, MEAN, SIMPLE, VARIANTS, make_qkv, run
from torch._dynamo.testing import CompileCounterWithBackend

from fbila import linear_attn, simple_la

LENGTHS = [(127, 64), (193, 77), (4096, 1000) if CUDA else (300, 33)]

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda x: x.name)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_bits(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y) and x.stride() == y.stride()


@each_variant
@pytest.mark.parametrize("token_major", [False, True])
def test_lengths_share_one_graph(variant, token_major):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(variant, fullgraph=True, backend=counter)
    for N, M in LENGTHS:
        tensors = make_qkv((2, 3, N, M, 16, 8), torch.float32)
        if token_major:
            tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        assert_same_bits(run(compiled, *tensors), run(variant, *tensors))
    # Once for the first length, once more for any length.
    assert counter.frame_count <= 2


def test_dynamic_from_the_start_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k, v):
        return linear_attn(q, k, v, feature_map="elu1", eps=1e-4, impl="triton")

    for N, M in LENGTHS:
        q, k, v, _ = make_qkv((2, 3, N, M, 16, 8), torch.float32)
        assert torch.equal(compiled(q, k, v), MEAN(q, k, v))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dynamic", [None, True])
def test_eps_and_scale_may_change_from_call_to_call(dynamic):
    def both(q, k, v, eps, scale):
        options = {"feature_map": "elu1", "impl": "triton"}
        return [
            linear_attn(q, k, v, eps=eps, **options),
            simple_la(q, k, v, scale=scale, **options),
        ]

    # Floats that change become symbols, which the checks must let pass.
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    q, k, v, _ = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    for eps, scale in ((0.3, 0.3), (1e-15, -1e-3), (1.0, 2.5)):
        assert_same_bits(compiled(q, k, v, eps, scale), both(q, k, v, eps, scale))


def test_inductor_with_work_around_the_operator():
    def block(q, k, v, variant):
        return variant(q * 2, k + 1, v).transpose(1, 2).flatten(2).relu()

    q, k, v, _ = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    do = torch.randn(1, 33, 16, device=q.device)
    compiled = torch.compile(block, fullgraph=True)
    actual = run(lambda *x: compiled(*x, MEAN), q, k, v, do)
    expected = run(lambda *x: block(*x, MEAN), q, k, v, do)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_operator_is_opaque_to_the_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(SIMPLE, fullgraph=True, backend=backend)
    compiled(*make_qkv((1, 2, 33, 20, 16, 8), torch.float32)[:3])
    (graph,) = graphs
    calls = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert calls == [torch.ops.fbila.linear_attn]


def test_compiled_under_autocast():
    def autocast(q, k, v):
        with torch.autocast(q.device.type, dtype=torch.float16):
            return MEAN(q, k, v)

    q, k, v, _ = make_qkv((1, 2, 33, 20, 16, 8), torch.float32)
    compiled = torch.compile(autocast, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), autocast(q, k, v))
