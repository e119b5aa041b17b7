"""LinFusion's layer computes the paper's formula, and starts from softmax projections."""

import pytest
import torch
from torch import nn

from fbila import linear_attn
from fbila.layers import GeneralizedLinearAttention, nonlinear_projection

NAMES = [
    "to_q.weight",
    "to_k.weight",
    "to_v.weight",
    "to_out.0.weight",
    "to_out.0.bias",
    "to_q_.0.weight",
    "to_q_.0.bias",
    "to_q_.1.weight",
    "to_q_.1.bias",
    "to_q_.3.weight",
    "to_q_.3.bias",
    "to_k_.0.weight",
    "to_k_.0.bias",
    "to_k_.1.weight",
    "to_k_.1.bias",
    "to_k_.3.weight",
    "to_k_.3.bias",
]


class Softmax(nn.Module):
    """What `start_from` needs of a softmax layer."""

    def __init__(self, dim: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])


def by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """The published formula, from the parameters alone and with an explicit (N, N) matrix."""

    def f(which):
        h = x @ p[f"to_{which}_.0.weight"].T + p[f"to_{which}_.0.bias"]
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        h = h * p[f"to_{which}_.1.weight"] + p[f"to_{which}_.1.bias"]
        h = torch.where(h > 0, h, 0.01 * h)
        return h @ p[f"to_{which}_.3.weight"].T + p[f"to_{which}_.3.bias"]

    b, n, c = x.shape
    q = (x + f("q")) @ p["to_q.weight"].T
    k = (x + f("k")) @ p["to_k.weight"].T
    v = x @ p["to_v.weight"].T
    q, k, v = (t.view(b, n, heads, c // heads) for t in (q, k, v))
    q, k = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    weights = scores / n / (scores.mean(-1, keepdim=True) + 1e-4)
    out = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(b, n, c)
    return out @ p["to_out.0.weight"].T + p["to_out.0.bias"]


def test_parameter_names():
    layer = GeneralizedLinearAttention(32, num_heads=4)
    assert sorted(dict(layer.named_parameters())) == sorted(NAMES)


@pytest.mark.parametrize("mid_dim", [None, 3])
def test_output_and_gradients(mid_dim):
    torch.manual_seed(0)
    layer = GeneralizedLinearAttention(48, 3, mid_dim, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    x = torch.randn(2, 33, 48, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    output, expected = layer(x), by_hand(parameters, x, 3)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    inputs = [x, *parameters.values()]
    for ours, theirs in zip(
        torch.autograd.grad(output, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.fixture
def in_kernel(monkeypatch):
    """Lets the projections compute as they do on a GPU; returns when they asked."""
    asked, find_out = [], nonlinear_projection._in_kernel

    class OnGPU:
        """A tensor that says that it is there."""

        is_cuda = True

    monkeypatch.setattr(nonlinear_projection, "ordinary", lambda h: True)
    monkeypatch.setattr(
        nonlinear_projection,
        "_in_kernel",
        lambda h, *modules: asked.append(find_out(OnGPU, *modules)) or asked[-1],
    )
    return asked


@pytest.mark.parametrize("mid_dim", [None, 3])
def test_output_and_gradients_with_one_kernel_for_norm_and_activation(mid_dim, in_kernel):
    test_output_and_gradients(mid_dim)
    assert in_kernel == [True, True]


def test_hooks_on_the_norm_are_run(in_kernel):
    layer, seen = GeneralizedLinearAttention(16, 2), []
    layer.to_q_[1].register_forward_hook(lambda *_: seen.append("q"))
    layer.to_k_[2].forward = lambda h: seen.append("k") or h
    layer(torch.randn(1, 5, 16))
    assert seen == ["q", "k"] and in_kernel == [False, False]


def test_under_autocast_the_input_is_kept_once():
    """Of one dtype and one memory, for the three layers that read it."""
    layer, kept = GeneralizedLinearAttention(16, 2), []

    def keep(x):
        kept.append((x.shape, x.dtype, x.data_ptr()))
        return x

    x = torch.randn(2, 5, 16)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(x.requires_grad_())
    rows = [found for found in kept if found[0].numel() == x.numel()]
    inputs = [found for found in rows if found[2] == rows[0][2]]
    assert len(inputs) == 3 and {dtype for _, dtype, _ in inputs} == {torch.bfloat16}


@pytest.mark.parametrize("mid_dim", [None, 5, -1])
def test_starts_as_linear_attention_over_the_softmax_projections(mid_dim):
    torch.manual_seed(0)
    softmax = Softmax(32).double()
    layer = GeneralizedLinearAttention(32, 4, mid_dim, dtype=torch.float64)
    layer.start_from(softmax)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    q, k, v = (
        project(x).view(2, 9, 4, 8).transpose(1, 2)
        for project in (softmax.to_q, softmax.to_k, softmax.to_v)
    )
    out = linear_attn(q, k, v, feature_map="elu1", eps=1e-4).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), softmax.to_out[0](out), rtol=1e-10, atol=1e-12)


def test_the_nonlinear_projections_train_from_the_start():
    layer = GeneralizedLinearAttention(16, 2)
    layer.start_from(Softmax(16))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):  # the last map moves in the first step, the ones before it in the second
        optimizer.zero_grad()
        layer(torch.randn(2, 9, 16)).square().sum().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_minus_one_is_the_identity():
    layer = GeneralizedLinearAttention(16, 2, -1)
    assert isinstance(layer.to_q_, nn.Identity)
    assert sorted(dict(layer.named_parameters())) == sorted(NAMES[:5])


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="num_heads must divide dim, got dim=16 and num_heads=3"):
        GeneralizedLinearAttention(16, 3)
