"""x SiLU(g) in one kernel, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES

from fbila.ops import silu_gate_library as library

KINDS = [*DTYPES, torch.float64]


def draw(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def near(actual, expected):
    eps = (1 if actual.dtype.itemsize == 2 else 16) * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=eps, atol=32 * eps)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 40), (5, 7), (1,), (3, 2000)], ids=str)
@pytest.mark.parametrize("by", ["in_kernel", "in_pytorch"])
def test_it_is_exact(by, shape, dtype):
    x, g, dy = (draw(*shape, dtype=dtype, seed=i) for i in range(3))
    x = x.repeat_interleave(2, -1)[..., ::2]
    leaves = [t.double().requires_grad_() for t in (x, g)]
    expected = leaves[0] * F.silu(leaves[1])
    near(getattr(library, by)(x, g), expected.detach())
    backward = getattr(library, f"backward_{by}")
    wanted = torch.autograd.grad(expected, leaves, dy.double())
    for found, exactly in zip(backward(dy, x, g), wanted, strict=True):
        assert found.dtype == dtype and found.is_contiguous()
        near(found, exactly)


def test_opcheck():
    x, g = (draw(2, 3, 4, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    dy = torch.ones_like(x)
    torch.library.opcheck(torch.ops.fbila.silu_gate.default, (x, g))
    torch.library.opcheck(torch.ops.fbila.silu_gate_backward.default, (dy, x.detach(), g.detach()))


def test_other_dtypes_and_shapes():
    x, g = draw(2, 3, dtype=torch.float32, seed=0), draw(3, dtype=torch.float64, seed=1)
    torch.testing.assert_close(library.silu_gate(x, g), x * F.silu(g))
    with pytest.raises(ValueError, match="one shape and dtype"):
        library.in_kernel(x, g)


def test_empty():
    x = torch.empty(0, 3, device=DEVICE)
    assert library.in_kernel(x, x).shape == x.shape
    assert library.backward_in_kernel(x, x, x)[1].shape == x.shape


def test_gradients_of_gradients_are_refused():
    x, g = (draw(2, 3, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    y = torch.ops.fbila.silu_gate(x, g)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice"):
        slope.sum().backward()
