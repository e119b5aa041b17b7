"""Export, CUDA graphs and function transforms: they work, or say that they do not."""

import pytest
import torch
from helpers import DEVICE, MEAN, SIMPLE, make_qkv, run

from fbila import Rotary, State, focused_la, linear_attn, linear_attn_apply, linear_attn_state

SHAPE = (2, 3, 33, 20, 16, 8)
BOTH = {"feature_map": "elu1", "impl": "triton"}


class Attention(torch.nn.Module):
    def __init__(self, variant):
        super().__init__()
        self.variant = variant

    def forward(self, q, k, v):
        return self.variant(q, k, v)


@pytest.mark.parametrize("variant", [MEAN, SIMPLE], ids=lambda x: x.name)
def test_export_for_any_batch_and_lengths(variant):
    q, k, v, _ = make_qkv(SHAPE, torch.float32)
    B, N, M = (torch.export.Dim(name) for name in "BNM")
    sizes = {"q": {0: B, 2: N}, "k": {0: B, 2: M}, "v": {0: B, 2: M}}
    exported = torch.export.export(Attention(variant), (q, k, v), dynamic_shapes=sizes).module()
    assert torch.equal(exported(q, k, v), variant(q, k, v))
    q, k, v, _ = make_qkv((1, 3, 70, 5, 16, 8), torch.float32)
    assert torch.equal(exported(q, k, v), variant(q, k, v))


def test_vmap_is_right():
    q, k, v, _ = make_qkv((4, 3, 33, 20, 16, 8), torch.float32)
    q, k, v = (x.unflatten(0, (2, 2)) for x in (q, k, v))
    o = torch.func.vmap(MEAN)(q, k, v)
    assert torch.equal(o.flatten(0, 1), MEAN(*(x.flatten(0, 1) for x in (q, k, v))))


def test_function_transforms_of_the_gradient_are_refused():
    q, k, v, _ = make_qkv(SHAPE, torch.float32)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda q: MEAN(q, k, v).sum())(q)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda q: MEAN(q, k, v), (q,), (q,))


# The other options and functions, on q, k and v of as many tokens.


def every_option(q, k, v):
    N = q.shape[2]
    angles = torch.arange(N * 8, device=q.device, dtype=torch.float32).view(N, 8)
    weight = torch.arange(N, device=q.device).remainder(5).float().expand(q.shape[0], N)
    options = {"rotary": Rotary(angles.cos(), angles.sin(), interleaved=False)}
    options.update(key_weight=weight, key_mask=weight < 4)
    return linear_attn(q, k, v, **options, **BOTH)


def packed(q, k, v):
    """The heads as one sequence after the other."""
    B, H, N, _ = q.shape
    q, k, v = (x.reshape(B * H * N, 1, x.shape[-1]) for x in (q, k, v))
    bounds = torch.arange(B * H + 1, device=q.device) * N
    return linear_attn(q, k, v, cu_seqlens=bounds, **BOTH).view(B, H, N, v.shape[-1])


def halves(q, k, v):
    return linear_attn_apply(q, linear_attn_state(k, v, **BOTH), **BOTH)


def focused(q, k, v):
    scale = torch.linspace(-1, 1, 48, device=q.device).view(3, 16)
    return focused_la(q, k, v, scale=scale, impl="triton")


def at_positions(q, k, v):
    positions = torch.linspace(-1, 1, 48, device=k.device).view(3, 1, 16).expand(k.shape[1:])
    return focused_la(q, k, v, key_positions=positions, impl="triton")


FUNCTIONS = [every_option, packed, halves, focused, at_positions]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda x: x.__name__)
each_sum = pytest.mark.parametrize("of", [0, 1], ids=["kv", "key_sum"])


@each_function
def test_export_of_options(function):
    q, k, v, _ = make_qkv((2, 3, 20, 20, 16, 8), torch.float32)
    B, N = (torch.export.Dim(name) for name in "BN")
    sizes = {name: {0: B, 2: N} for name in "qkv"}
    exported = torch.export.export(Attention(function), (q, k, v), dynamic_shapes=sizes).module()
    assert torch.equal(exported(q, k, v), function(q, k, v))
    q, k, v, _ = make_qkv((3, 3, 33, 33, 16, 8), torch.float32)
    assert torch.equal(exported(q, k, v), function(q, k, v))


@each_function
def test_vmap_of_options_is_right(function):
    q, k, v, _ = make_qkv((4, 3, 20, 20, 16, 8), torch.float32)
    q, k, v = (x.unflatten(0, (2, 2)) for x in (q, k, v))
    o = torch.func.vmap(function)(q, k, v)
    assert torch.equal(o, torch.stack([function(*x) for x in zip(q, k, v, strict=True)]))


@each_function
@pytest.mark.parametrize("of", [0, 1, 2], ids=["q", "k", "v"])
def test_transforms_of_the_gradient_of_options_are_refused(of, function):
    tensors = make_qkv((2, 3, 20, 20, 16, 8), torch.float32)[:3]

    def of_one(x):
        return function(*tensors[:of], x, *tensors[of + 1 :])

    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: of_one(x).sum())(tensors[of])
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(of_one, (tensors[of],), (tensors[of],))


@each_function
@pytest.mark.parametrize("of", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("linear", [True, False])
def test_second_derivatives_of_options_are_refused(linear, of, function):
    tensors = [x.requires_grad_() for x in make_qkv((2, 3, 20, 20, 16, 8), torch.float32)[:3]]
    o = function(*tensors)
    loss = o.sum() if linear else (o**2).sum()
    (gradient,) = torch.autograd.grad(loss, tensors[of], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        (gradient**2).sum().backward()


@each_sum
def test_vmap_of_the_state_is_right(of):
    _, k, v, _ = make_qkv((2, 3, 20, 20, 16, 8), torch.float32)
    sums = torch.func.vmap(lambda k: linear_attn_state(k, v, **BOTH)[of])(torch.stack((k, -k)))
    assert torch.equal(sums, torch.stack([linear_attn_state(x, v, **BOTH)[of] for x in (k, -k)]))


@each_sum
def test_transforms_of_the_gradient_of_the_state_are_refused(of):
    _, k, v, _ = make_qkv((2, 3, 20, 20, 16, 8), torch.float32)

    def of_keys(k):
        return linear_attn_state(k, v, **BOTH)[of]

    with pytest.raises(RuntimeError):
        torch.func.grad(lambda k: of_keys(k).sum())(k)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(of_keys, (k,), (k,))


def test_second_derivatives_of_other_tensors_are_refused():
    q, k, v, _ = make_qkv((2, 3, 20, 20, 16, 8), torch.float32)
    weight = torch.ones(2, 20, device=DEVICE, requires_grad=True)
    scale = torch.zeros(3, 16, device=DEVICE, requires_grad=True)
    positions = torch.ones(3, 20, 16, device=DEVICE, requires_grad=True)
    state = linear_attn_state(k, v, **BOTH)
    state = State(*(x.detach().requires_grad_() for x in state))
    for learned, o in (
        (weight, linear_attn(q, k, v, key_weight=weight, **BOTH)),
        (weight, linear_attn_apply(q, linear_attn_state(k, v, key_weight=weight, **BOTH), **BOTH)),
        (scale, focused_la(q, k, v, scale=scale, impl="triton")),
        (positions, focused_la(q, k, v, key_positions=positions, impl="triton")),
        (state.kv, linear_attn_apply(q, state, **BOTH)),
    ):
        (gradient,) = torch.autograd.grad((o**2).sum(), learned, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiated twice"):
            (gradient**2).sum().backward()


@pytest.mark.gpu
@each_function
def test_cuda_graph_of_options(function):
    shape = (2, 3, 1000, 1000, 16, 64)
    tensors = make_qkv(shape, torch.float16)
    run(function, *tensors)  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(function, *tensors)
    for x, y in zip(tensors, make_qkv(shape, torch.float16, seed=1), strict=True):
        x.copy_(y)
    graph.replay()
    for x, y in zip(captured, run(function, *tensors), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@each_function
def test_no_option_waits_for_the_gpu(function):
    tensors = make_qkv((2, 3, 1000, 1000, 16, 64), torch.float16)
    run(function, *tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(function, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph_of_forward_and_backward():
    tensors = make_qkv((2, 3, 1000, 1100, 64, 64), torch.float16)
    run(MEAN, *tensors)  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(MEAN, *tensors)
    for seed in (1, 2):
        for x, y in zip(tensors, make_qkv((2, 3, 1000, 1100, 64, 64), torch.float16, seed=seed),
                        strict=True):  # fmt: skip
            x.copy_(y)
        graph.replay()
        for x, y in zip(captured, run(MEAN, *tensors), strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_inputs_made_late_on_another_stream():
    tensors = make_qkv((2, 3, 1000, 1100, 64, 64), torch.float16)
    expected = run(MEAN, *tensors)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(x) for x in tensors]
        torch.cuda._sleep(100_000_000)
        for x, y in zip(late, tensors, strict=True):
            x.copy_(y)
        actual = run(MEAN, *late)
    torch.cuda.synchronize()
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_a_device_that_is_not_the_current_one():
    tensors = make_qkv(SHAPE, torch.float16)
    elsewhere = run(MEAN, *(x.to("cuda:1") for x in tensors))
    for x, y in zip(elsewhere, run(MEAN, *tensors), strict=True):
        assert x.device == torch.device("cuda:1") and torch.equal(x.to("cuda:0"), y)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    tensors = make_qkv((2, 3, 1000, 1100, 64, 64), torch.float16)
    run(MEAN, *tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(MEAN, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_many_gradients_at_once():
    q, k, v, _ = make_qkv((1, 2, 5, 5, 4, 6), torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, state = linear_attn(*leaves, **BOTH), linear_attn_state(*leaves[1:], **BOTH)
    for y, inputs in (
        (o, leaves),
        (state.kv, leaves[1:]),
        (linear_attn_apply(leaves[0], state, **BOTH), leaves),
    ):
        many = torch.randn(3, *y.shape, device=DEVICE)
        found = torch.autograd.grad(y, inputs, many, retain_graph=True, is_grads_batched=True)
        for i, dy in enumerate(many):
            expected = torch.autograd.grad(y, inputs, dy, retain_graph=True)
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one[i], other)
