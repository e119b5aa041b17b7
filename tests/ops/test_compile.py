"""torch.compile takes the public functions whole, once for all lengths."""

import pytest
import torch
from helpers import CUDA, DEVICE, MEAN, SIMPLE, VARIANTS, make_qkv, run
from torch._dynamo.testing import CompileCounterWithBackend

from fbila import (
    Rotary,
    State,
    focused_la,
    linear_attn,
    linear_attn_apply,
    linear_attn_state,
    simple_la,
)

# The interpreter takes its time over every tile of tokens.
LENGTHS = [(127, 64), (193, 77), (4096, 1000)] if CUDA else [(17, 12), (70, 40), (33, 20)]

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


# The other options and functions. Each takes q, k, v and the tensors that its name speaks of.

BOTH = {"feature_map": "elu1", "impl": "triton"}


def rotary(q, k, v, cos, sin):
    return linear_attn(q, k, v, eps=1e-4, rotary=(cos, sin), **BOTH)


def rotary_of_halves(q, k, v, cos, sin):
    return simple_la(q, k, v, rotary=Rotary(cos, sin, interleaved=False), **BOTH)


def weight_and_mask(q, k, v, weight, mask):
    return linear_attn(q, k, v, eps=1e-4, key_weight=weight, key_mask=mask, **BOTH)


def packed(q, k, v, cu_seqlens, mask):
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    options = {"cu_seqlens": cu_seqlens, "key_mask": mask[0]}
    return linear_attn(q, k, v, eps=1e-4, **options, **BOTH).transpose(0, 1)[None]


def two_states(q, k, v, cos, sin, mask):
    parts = [
        linear_attn_state(
            k[:, :, keys], v[:, :, keys], rotary=(cos[keys], sin[keys]), key_mask=mask[:, keys],
            **BOTH,
        )
        for keys in (slice(0, 5), slice(5, None))
    ]  # fmt: skip
    return linear_attn_apply(q, parts[0] + parts[1], eps=1e-4, rotary=(cos, sin), **BOTH)


def focused(q, k, v, scale, mask):
    return focused_la(q, k, v, scale=scale, eps=1e-4, key_mask=mask, impl="triton")


def at_positions(q, k, v, positions):
    return focused_la(q, k, v, key_positions=positions, eps=1e-4, impl="triton")


FUNCTIONS = [rotary, rotary_of_halves, weight_and_mask, packed, two_states, focused, at_positions]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)


def make_call(function, N):
    """q, k, v and do of N tokens, and the other tensors; all that learn require a gradient."""
    B = 1 if function is packed else 2
    tensors = make_qkv((B, 3, N, N, 8, 6), torch.float32, seed=N)
    angles = torch.arange(4.0 * N, device=DEVICE).view(N, 4)
    mask = torch.arange(B * N, device=DEVICE).view(B, N) % 3 != 1
    weight = torch.linspace(0.1, 2, B * N, device=DEVICE).view(B, N).requires_grad_()
    scale = torch.linspace(-1, 1, 24, device=DEVICE).view(3, 8).requires_grad_()
    positions = torch.linspace(-1, 1, 24 * N, device=DEVICE).view(N, 3, 8).requires_grad_()
    bounds = [*range(0, N, 5), N]
    tables = [angles.cos(), angles.sin()]
    others = {
        rotary: tables,
        rotary_of_halves: tables,
        weight_and_mask: [weight, mask],
        packed: [torch.tensor(bounds, dtype=torch.int32, device=DEVICE), mask],
        two_states: [*tables, mask],
        focused: [scale, mask],
        at_positions: [positions.transpose(0, 1)],
    }
    return tensors, others[function]


def result_and_gradients(function, tensors, others):
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    o = function(*leaves, *others)
    wanted = [*leaves, *(x for x in others if x.requires_grad)]
    return [o.detach(), *torch.autograd.grad(o, wanted, tensors[3])]


@each_function
def test_options_share_one_graph(function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for N in (17, 20, 33):
        call = make_call(function, N)
        assert_same_bits(
            result_and_gradients(compiled, *call), result_and_gradients(function, *call)
        )
    # Once for the first length and number of sequences, once more for any of either.
    assert counter.frame_count <= (3 if function is packed else 2)


@each_function
def test_options_dynamic_from_the_start_compile_once(function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for N in (17, 33, 40):
        (q, k, v, _), others = make_call(function, N)
        assert torch.equal(compiled(q, k, v, *others), function(q, k, v, *others))
    assert counter.frame_count == 1


def test_a_state_passes_from_graph_to_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def remember(k, v):
        return linear_attn_state(k, v, **BOTH)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def recall(q, state):
        return linear_attn_apply(q, state + state, **BOTH)

    def recall_eagerly(q, k, v):
        state = linear_attn_state(k, v, **BOTH)
        return linear_attn_apply(q, state + state, **BOTH)

    tensors = make_qkv((2, 3, 20, 17, 8, 6), torch.float32)
    assert isinstance(remember(*tensors[1:3]), State)
    actual = run(lambda q, k, v: recall(q, remember(k, v)), *tensors)
    assert_same_bits(actual, run(recall_eagerly, *tensors))
