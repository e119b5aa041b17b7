"""LinFusion's layer as one operation: the same answer and gradients, and little kept for them."""

from types import SimpleNamespace

import pytest
import torch
from helpers import CUDA, DEVICE
from test_linfusion_layer import by_hand
from torch import nn

from fbila.layers import GeneralizedLinearAttention, linfusion_gradient
from fbila.layers.linfusion import EPS


def make(dtype=torch.float64, mid_dim=None):
    torch.manual_seed(0)
    layer = GeneralizedLinearAttention(48, 3, mid_dim, dtype=dtype, device=DEVICE)
    x = torch.randn(2, 33, 48, dtype=dtype, device=DEVICE, requires_grad=True)
    return layer, x


@pytest.mark.parametrize("mid_dim", [None, 3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_and_gradients(dtype, bound, mid_dim):
    layer, x = make(dtype, mid_dim)
    parameters = dict(layer.named_parameters())
    upstream = torch.randn_like(x)
    output = linfusion_gradient.attend(layer, x, EPS)
    exact = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    exact_x = x.detach().double().requires_grad_()
    expected = by_hand(exact, exact_x, 3)
    actual = torch.autograd.grad(output, [x, *parameters.values()], upstream)
    wanted = torch.autograd.grad(expected, [exact_x, *exact.values()], upstream.double())
    for ours, theirs in zip((output, *actual), (expected, *wanted), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()


def test_an_input_that_is_no_rows_and_needs_no_gradient():
    layer, x = make()
    x = x.detach().transpose(0, 1)
    output = linfusion_gradient.attend(layer, x, EPS)
    torch.testing.assert_close(output, layer.cpu()(x.cpu()).to(DEVICE))
    output.sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


def test_wider_weights_are_cast_and_their_gradients_wide():
    layer, x = make(torch.float32)
    with torch.no_grad():
        x = x.half()
    output = linfusion_gradient.attend(layer, x.requires_grad_(), EPS)
    assert output.dtype == torch.float16
    gradients = torch.autograd.grad(output.float().square().sum(), [x, *layer.parameters()])
    assert [g.dtype for g in gradients] == [torch.float16] + 17 * [torch.float32]
    wide = by_hand(dict(layer.double().named_parameters()), x.double(), 3)
    torch.testing.assert_close(output.double(), wide, rtol=0, atol=4e-3)


def test_what_is_kept():
    layer, x = make(torch.float32, 48)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        linfusion_gradient.attend(layer, x, EPS)
    weights = sum(p.numel() for p in layer.parameters()) * 4
    small = 2 * 3 * (33 + 16 * 17) * 4  # the inverse denominators and the state of each head
    # The input, W_1 x and x + F(x) for queries and keys, q, k, v, and o.
    assert sum(kept.values()) <= 9 * x.numel() * 4 + weights + small


def test_a_second_derivative_is_refused():
    layer, x = make()
    output = linfusion_gradient.attend(layer, x, EPS)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.fixture
def asked(monkeypatch):
    """`serves`, of an input that says that it is on a GPU."""
    monkeypatch.setattr(linfusion_gradient, "ordinary", lambda *_: True)

    def ask(layer, dtype=torch.float64):
        device = next(layer.parameters()).device
        x = SimpleNamespace(is_cuda=True, dtype=dtype, device=device, numel=lambda: 1)
        return linfusion_gradient.serves(layer, x)

    return ask


def test_a_layer_that_is_to_be_trained_is_one_operation(asked):
    assert asked(make()[0])
    assert not asked(GeneralizedLinearAttention(48, 3, -1, dtype=torch.float64))


def _freeze(layer):
    layer.requires_grad_(False)


def _hook(layer):
    layer.to_k_[3].register_forward_hook(lambda *_: None)


def _hook_the_projection(layer):
    layer.to_q_.register_forward_pre_hook(lambda *_: None)


def _replace(layer):
    layer.to_v = nn.Sequential(layer.to_v)


def _replace_a_forward(layer):
    layer.to_out[0].forward = lambda x: x


def _drop(layer):
    layer.to_out[1].p = 0.1


def _mix(layer):
    layer.to_v.float()


def _make_heads_too_wide(layer):
    layer.to_v.in_features = 257 * layer.heads


@pytest.mark.parametrize(
    "change",
    [_freeze, _hook, _hook_the_projection, _replace, _replace_a_forward, _drop, _mix,
     _make_heads_too_wide],
)  # fmt: skip
def test_anything_else_takes_the_long_way(change, asked):
    layer, _ = make()
    change(layer)
    assert not asked(layer)


def test_other_dtypes_and_inference_take_the_long_way(asked):
    layer, _ = make()
    assert not asked(layer, torch.float32)
    with torch.no_grad():
        assert not asked(layer)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(2, 4096, 320, 8), (2, 64, 1280, 8), (1, 1024, 640, 10)])
def test_under_autocast_it_errs_no_more_than_the_long_way(shape):
    B, N, C, H = shape
    torch.manual_seed(0)
    layer = GeneralizedLinearAttention(C, H, device="cuda")
    x = torch.randn(B, N, C, device="cuda", requires_grad=True)
    upstream = torch.randn(B, N, C, device="cuda")
    inputs = [x, *layer.parameters()]
    calls = []
    apply = linfusion_gradient.attend
    results = {}
    for way in ("one", "long", "exact"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linfusion_gradient, "attend", lambda *a: calls.append(1) or apply(*a))
            if way != "one":
                patch.setattr(linfusion_gradient, "serves", lambda *_: False)
            if way == "exact":
                layer.double()
                output = layer(x.double())
                inputs = [x, *layer.parameters()]
            else:
                with torch.autocast("cuda", torch.bfloat16):
                    output = layer(x)
            gradients = torch.autograd.grad(output, inputs, upstream.to(output.dtype))
            results[way] = [t.double() for t in (output, *gradients)]
    assert len(calls) == 1
    for one, long, exact in zip(*results.values(), strict=True):
        assert (one - exact).norm() <= 1.3 * (long - exact).norm() + 1e-3 * exact.norm()
