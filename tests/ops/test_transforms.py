"""Export, CUDA graphs and function transforms: they work, or say that they do not."""

import pytest
import torch
from helpers import MEAN, SIMPLE, make_qkv, run

SHAPE = (2, 3, 33, 20, 16, 8)


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
