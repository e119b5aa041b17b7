"""What every vision layer promises besides its formula: `serves` is called with each of them."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import DEVICE, DTYPES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fbila.ops import centred_library, functional, halves


def randomize(layer: nn.Module) -> nn.Module:
    """Parameters without zeros and ones, so that each of them matters."""
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data.copy_(noise / max(p[0].numel(), 4) ** 0.5 + (0.5 if p.dim() == 1 else 0))
    return layer


def assert_formula(layer: nn.Module, by_hand: Callable, x: Tensor, *size, **settings) -> None:
    """`by_hand(parameters, x, *size, **settings)` is the layer's answer, in float64 and float32.

    So are the gradients of x and of all parameters. Errors are relative to the largest entry.
    """
    randomize(layer)
    wide = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    expected = by_hand(wide, exact_x, *size, **settings)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    wanted = [expected, *torch.autograd.grad(expected, [exact_x, *wide.values()], upstream)]
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        layer.to(dtype)
        leaf = x.detach().to(dtype).requires_grad_()
        output = layer(leaf, *size)
        inputs = [leaf, *layer.parameters()]
        actual = [output, *torch.autograd.grad(output, inputs, upstream.to(dtype))]
        for name, ours, theirs in zip(("y", "x", *wide), actual, wanted, strict=True):
            assert ours.dtype == dtype and ours.shape == theirs.shape
            error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)
            assert error <= bound, f"{name} in {dtype}: {error:.1e}"


def run(layer: Callable, x: Tensor, *size) -> list[Tensor]:
    """The answer and the gradient of x."""
    x = x.detach().requires_grad_()
    y = layer(x, *size)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), x)]


def assert_serves(layer: nn.Module, x: Tensor, *size) -> None:
    """Checkpointing, copies, pickles, state dicts, bfloat16, autocast, inference, no pictures."""
    randomize(layer)
    expected = run(layer, x, *size)

    def checkpointed(x, *size):
        return checkpoint(layer, x, *size, use_reentrant=False)

    loaded = copy.deepcopy(layer)
    nn.init.zeros_(next(loaded.parameters()))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for other in (
        checkpointed, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded
    ):  # fmt: skip
        for ours, theirs in zip(run(other, x, *size), expected, strict=True):
            assert torch.equal(ours, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x, *size), expected[0])
        assert layer(x[:0], *size).shape == expected[0][:0].shape
    with torch.autocast("cpu", torch.bfloat16):
        lows = [run(layer, x, *size)]
    lows.append(run(copy.deepcopy(layer).bfloat16(), x.bfloat16(), *size))
    for low in lows:
        assert low[0].dtype == torch.bfloat16
        for ours, theirs in zip(low, expected, strict=True):
            assert (ours.float() - theirs).norm() <= 0.05 * theirs.norm()


def assert_compiles(layer: nn.Module, *calls: tuple) -> None:
    """Calls `(x, *size)` of different sizes by one graph, compiled once, forward and backward."""
    randomize(layer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for call in calls:
        for ours, theirs in zip(run(compiled, *call), run(layer, *call), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def assert_kernels_agree(
    monkeypatch: pytest.MonkeyPatch, layer: nn.Module, x: Tensor, *size
) -> None:
    """Answer and gradients by the kernels, in every dtype, are those of the reference in float32.

    Without a GPU the interpreter runs the kernels.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    randomize(layer).to(DEVICE)
    x = x.to(DEVICE)
    results = {}
    for impl in ("reference", "triton"):
        for module in (centred_library, functional, halves):
            monkeypatch.setattr(module, "choose_implementation", lambda *_, impl=impl: impl)
        dtypes = DTYPES if impl == "triton" else [torch.float32]
        for dtype in dtypes:
            copied = copy.deepcopy(layer).to(dtype)
            results[impl, dtype] = run(copied, x.to(dtype), *size)
    expected = results.pop(("reference", torch.float32))
    for (_, dtype), actual in results.items():
        bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == dtype
            assert (ours.float() - theirs).norm() <= bound * theirs.norm()


def assert_factory(make: Callable[..., nn.Module]) -> None:
    """`device` and `dtype` reach every parameter."""
    layer = make(device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}


class Capture:
    """Stands in for an operator, and remembers the tensors that it was called with."""

    def __init__(self, operator: Callable) -> None:
        self.operator = operator
        self.inputs: list[Tensor] = []

    def __call__(self, *tensors, **options):
        self.inputs = list(tensors)
        self.output = self.operator(*tensors, **options)
        return self.output


def memory_of(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
