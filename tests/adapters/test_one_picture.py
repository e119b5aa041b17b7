"""All scales of `LiteMLA` in one picture for inference, and where they are not."""

import pytest
import torch
from helpers import CUDA, DEVICE, LOW
from timm.models.efficientvit_mit import LiteMLA
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fbila
from fbila.adapters.acceleration import one_picture
from fbila.adapters.acceleration.lite_mla import weight_alone
from fbila.adapters.acceleration.relu_attention import attend_contiguous, attend_picture, join_heads
from fbila.ops import separable_conv_library
from fbila.ops.autograd import ordinary


@pytest.fixture
def written(monkeypatch):
    """Has the kernel run, through Triton's interpreter where there is no GPU; what it wrote."""
    results = []

    def run(y, x, *weights):
        results.append(y)
        separable_conv_library.separable_conv2d_into(y, x, *weights)

    monkeypatch.setattr(one_picture, "separable_conv2d_into", run)
    if not CUDA:
        monkeypatch.setattr(one_picture, "direct", ordinary)
    return results


def made(dtype=torch.float64, **settings):
    """A model of one module, with statistics that its norms show."""
    torch.manual_seed(0)
    model = nn.ModuleList([LiteMLA(32, 32, dim=16, **settings)]).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(2.0)
    return model.to(DEVICE, dtype)


def picture(dtype=torch.float64, shape=(2, 32, 6, 10)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_near(actual, expected):
    """Stock attention is in float32 whatever the dtype is."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_it_is_stock(model, x, written, parts):
    """The output is stock's, and so many scales were written into one picture."""
    stock = model[0](x)
    with fbila.accelerate(model):
        fast = model[0](x)
    assert len(written) == parts
    assert fast.dtype == stock.dtype and fast.shape == stock.shape
    assert_near(fast, stock)


SHAPES = [(2, 32, 6, 10), (1, 32, 5, 7), (3, 32, 1, 9), (3, 32, 1, 1), (1, 32, 1, 1)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@each_shape
@pytest.mark.parametrize("scales", [(5,), (3, 5), (7, 3, 1)], ids=str)
@torch.no_grad()
def test_it_computes_what_stock_does(shape, scales, written):
    assert_it_is_stock(made(scales=scales), picture(shape=shape), written, len(scales))
    # One after the other in one tensor, behind the part that they are made of.
    step = written[0].data_ptr() - written[0].untyped_storage().data_ptr()
    assert step == 96 * shape[2] * shape[3] * 8
    for i, part in enumerate(written, 1):
        assert part.untyped_storage().data_ptr() == written[0].untyped_storage().data_ptr()
        assert part.data_ptr() - part.untyped_storage().data_ptr() == i * step


@torch.no_grad()
def test_without_other_scales(written):
    assert_it_is_stock(made(scales=()), picture(), written, 0)


@pytest.mark.parametrize("shape", [(2, 32, 6, 10), (1, 32, 15, 17)], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@torch.no_grad()
def test_half_precision_errs_as_stock_does(shape, dtype, written):
    model, x = made(dtype), picture(dtype, shape)
    exact = made()
    exact.load_state_dict(model.state_dict())
    truth, stock = exact[0](x.double()), model[0](x)
    with fbila.accelerate(model):
        fast = model[0](x)
    assert len(written) == 1 and fast.dtype == dtype
    assert (fast.double() - truth).norm() <= 1.05 * (stock.double() - truth).norm()


@torch.no_grad()
def test_the_parts_are_those_of_stock(written):
    module, x = made(scales=(3, 5))[0], picture(shape=(3, 32, 5, 7))
    weight = weight_alone(module.qkv)
    scales = one_picture.scales_of(x, weight, module.aggreg, nn.Sequential)
    together = one_picture.in_one_picture(x, weight, scales)
    first = module.qkv(x)
    expected = torch.cat([first, *(scale(first) for scale in module.aggreg)], 1)
    assert together.is_contiguous()
    torch.testing.assert_close(together, expected)


@pytest.mark.parametrize("size", [(6, 10), (1, 9), (1, 1)], ids=str)
def test_attention_to_a_picture_somewhere_in_memory(size):
    qkv = picture(torch.float32, (3, 96, *size))[1:]
    assert qkv.storage_offset()
    expected = join_heads([attend_picture(qkv, 16, 1e-5)], size)
    torch.testing.assert_close(attend_contiguous(qkv, 16, 1e-5), expected)


@torch.no_grad()
def test_biases_of_the_scales(written):
    model = made(use_bias=True)
    assert_it_is_stock(model, picture(), written, 0)
    model[0].qkv.conv.bias = None
    assert_it_is_stock(model, picture(), written, 1)


def test_frozen_weights_need_no_grad_mode(written):
    model = made().requires_grad_(False)
    assert_it_is_stock(model, picture(), written, 1)
    # What it is put to is its own affair.
    model[0].proj.requires_grad_(True)
    written.clear()
    assert_it_is_stock(model, picture(), written, 1)
    with fbila.accelerate(model):
        model[0](picture()).sum().backward()
    assert model[0].proj.conv.weight.grad.any()


WEIGHTS = ["qkv.conv", "aggreg.0.0", "aggreg.0.1"]


@pytest.mark.parametrize("name", [None, *WEIGHTS])
def test_gradients_go_another_way(name, written):
    model, x = made().requires_grad_(False), picture()
    leaf = x.requires_grad_() if name is None else model[0].get_submodule(name).weight
    leaf.requires_grad_()
    assert_it_is_stock(model, x, written, 0)
    stock = torch.autograd.grad(model[0](x).square().sum(), leaf)[0]
    with fbila.accelerate(model):
        fast = torch.autograd.grad(model[0](x).square().sum(), leaf)[0]
    torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-4)


INSIDE = ["qkv", *(f"qkv.{name}" for name in ("dropout", "conv", "norm", "act")),
          "aggreg.0", "aggreg.0.0", "aggreg.0.1"]  # fmt: skip


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("name", [*INSIDE, "proj", "proj.conv"])
@torch.no_grad()
def test_hooks_are_called(name, hook, written):
    model, called = made(), []
    getattr(model[0].get_submodule(name), hook)(lambda *args: called.append(args))
    assert_it_is_stock(model, picture(), written, 0 if name in INSIDE else 1)
    assert len(called) == 2


@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_another_forward_is_called(name, written):
    model = made()
    module = model[0].get_submodule(name)
    original = module.forward
    module.forward = lambda x: 2 * original(x)
    assert_it_is_stock(model, picture(), written, 0)


OTHERS = {
    "norm": {"norm_layer": (nn.BatchNorm2d, nn.BatchNorm2d)},
    "activation": {"act_layer": (nn.SiLU, None)},
    "bias": {"use_bias": (True, False)},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_other_maps_run(settings, written):
    model = made(**settings)
    # A bias of the map alone.
    for scale in model[0].aggreg:
        for conv in scale:
            conv.bias = None
    assert_it_is_stock(model, picture(), written, 0)


CONVOLUTIONS = {
    "grouped": lambda: nn.Conv2d(32, 96, 1, groups=2, bias=False),
    "wide": lambda: nn.Conv2d(32, 96, 3, padding=1, bias=False),
    "normalised": lambda: weight_norm(nn.Conv2d(32, 96, 1, bias=False)),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@torch.no_grad()
def test_other_convolutions_run(make, written):
    model = made()
    model[0].qkv.conv = make().to(DEVICE, torch.float64)
    assert_it_is_stock(model, picture(), written, 0)


@torch.no_grad()
def test_other_aggregations_run(written):
    model = made()
    model[0].aggreg[0][0] = nn.Conv2d(96, 96, 5, padding=2, groups=48).to(DEVICE, torch.float64)
    assert_it_is_stock(model, picture(), written, 0)


@torch.no_grad()
def test_dropout_drops_while_it_is_trained(written):
    model, x = made(), picture()
    model[0].qkv.dropout.p = 0.5
    assert_it_is_stock(model, x, written, 1)
    model[0].qkv.dropout.train()
    written.clear()
    with fbila.accelerate(model):
        torch.manual_seed(0)
        fast = model[0](x)
    torch.manual_seed(0)
    assert not written
    assert_near(fast, model[0](x))


@torch.no_grad()
def test_other_orders_and_dtypes(written):
    model = made()
    assert_it_is_stock(model, picture().to(memory_format=torch.channels_last), written, 0)
    assert_it_is_stock(model, picture(shape=(2, 32, 6, 20))[..., ::2], written, 0)
    assert_it_is_stock(made(torch.float32), picture(torch.float32), written, 0)


@torch.no_grad()
def test_autocast_to_another_dtype(written):
    # Norms of the CPU take no mixture of dtypes.
    model, x = made(LOW[0], norm_layer=None), picture(LOW[0])
    other = torch.bfloat16 if LOW[0] is torch.float16 else torch.float16
    with fbila.accelerate(model):
        with torch.autocast(DEVICE, other):
            assert model[0](x).dtype == other
        assert not written
        with torch.autocast(DEVICE, LOW[0]):
            fast = model[0](x)
        assert len(written) == 1
        torch.testing.assert_close(fast, model[0](x))


@torch.no_grad()
def test_transforms_and_traces_see_stock(written):
    model, x = made().requires_grad_(False), picture(shape=(4, 32, 6, 10))
    stock = model[0](x)
    fbila.accelerate(model)
    module = model[0]
    assert_near(torch.vmap(module)(x.unflatten(0, (2, 2))).flatten(0, 1), stock)
    if CUDA:
        # Attention's own kernels have no forward derivative.
        with pytest.raises(RuntimeError):
            torch.func.jvp(module, (x,), (x,))
    else:
        _, slope = torch.func.jvp(module, (x,), (x,))
        assert slope.any()
    traced = torch.jit.trace(module, x, check_trace=False)
    assert not written
    assert_near(traced(x[:2]), stock[:2])


@torch.no_grad()
def test_compilers_see_no_kernel_of_one_picture(written):
    model, x = made(LOW[0]), picture(LOW[0])
    stock = model[0](x)
    fbila.accelerate(model)
    compiled = torch.compile(model[0].forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock, rtol=1e-2, atol=1e-2)
    assert not written


@torch.no_grad()
def test_errors_are_stocks(written):
    model = made()
    with fbila.accelerate(model):
        for shape in ((2, 16, 6, 10), (2, 32, 6)):
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                model[0](picture(shape=shape))
    assert not written


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@torch.no_grad()
def test_nothing_else_of_that_size_is_made():
    """The products are written in place, and no copy is kept of what they are made of."""
    module, x = made(torch.float16, scales=(5,))[0], picture(torch.float16, (8, 32, 64, 66))
    weight = weight_alone(module.qkv)
    scales = one_picture.scales_of(x, weight, module.aggreg, nn.Sequential)
    one_picture.in_one_picture(x, weight, scales)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    together = one_picture.in_one_picture(x, weight, scales)
    assert torch.cuda.max_memory_allocated() - before <= together.nbytes + 2**16
