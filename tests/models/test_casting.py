"""Weights of a block are cast for autocast at once: the same bits, by fewer kernels."""

import pytest
import timm
import torch
from torch import nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import fbila.models  # noqa: F401  registers the names
from fbila.layers.linear import Linear
from fbila.models.casting import parameters_of
from fbila.models.conv_tokens import TokenBlock
from fbila.models.grid_block import GridBlock
from fbila.models.ravlt_block import RAVLTBlock
from fbila.models.window_block import WindowBlock
from fbila.ops import casts
from fbila.ops.casts import cast_of, cast_together

BLOCKS = (GridBlock, RAVLTBlock, TokenBlock, WindowBlock)
SWIN = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 2, 1)}
MODELS = {
    "flatten_pvt_tiny": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "flatten_swin_tiny": SWIN,
    "polaformer_swin_tiny": SWIN,
    "mlla_tiny": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "vssd_micro": {"embed_dim": 16, "depths": (1, 1, 1, 1)},
    "ravlt_tiny": {"depths": (1, 1, 1, 1)},
}


def made(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, drop_path_rate=0.0, **MODELS[name], **options)


def narrow(enabled=True, dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype, enabled=enabled)


def trained(model, x):
    """The answer and the gradients of a step, and how often something was cast alone."""
    model.zero_grad()
    with profile() as seen:
        with narrow():
            y = model(x)
        y.float().square().sum().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    return [y.detach(), *(p.grad for p in model.parameters())], counts["aten::_to_copy"]


@pytest.fixture
def one_by_one(monkeypatch):
    """A function after which nothing is cast together."""

    def change():
        monkeypatch.setattr(casts, "ordinary", lambda *_: False)

    return change


@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_same_bits_by_fewer_casts(name, one_by_one):
    model, x = made(name), torch.randn(2, 3, 64, 64)
    # Tables of rotations are made once.
    trained(model, x)
    together, few = trained(model, x)
    one_by_one()
    expected, many = trained(model, x)
    for actual, wanted in zip(together, expected, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            assert torch.equal(actual, wanted)
    blocks = [m for m in model.modules() if isinstance(m, BLOCKS)]
    # Forward and backward.
    assert many - few == 2 * sum(len(parameters_of(block)) for block in blocks)


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_maps_of_blocks_are_among_them(name):
    for block in (m for m in made(name).modules() if isinstance(m, BLOCKS)):
        found = {id(p) for p in parameters_of(block)}
        for path, module in block.named_modules():
            # VSSD's is padded first.
            if isinstance(module, Linear) and (name, path) != ("vssd_micro", "attn.in_proj"):
                assert all(id(p) in found for p in module.parameters()), path


def test_what_is_no_plain_linear_map_casts_its_own():
    block = next(m for m in made("flatten_swin_tiny").modules() if isinstance(m, WindowBlock))
    everything = len(parameters_of(block))
    block.mlp.fc1.register_forward_pre_hook(lambda *_: None)
    assert len(parameters_of(block)) == everything - 2
    block.attn = nn.Identity()
    assert len(parameters_of(block)) == everything - 2 - 4


def test_frozen_weights_have_no_gradient():
    model, x = made("flatten_swin_tiny"), torch.randn(2, 3, 64, 64)
    frozen = [p for name, p in model.named_parameters() if "fc1" in name]
    for p in frozen:
        p.requires_grad_(False)
    first, *others = frozen[:2], *model.get_classifier().parameters()
    with narrow(), cast_together(x, [*first, others[0]]):
        assert not any(cast_of(x, p).requires_grad for p in first)
        assert cast_of(x, others[0]).requires_grad
    (_, *gradients), _ = trained(model, x)
    kinds = [p.requires_grad for p in model.parameters()]
    assert [g is not None for g in gradients] == kinds


class TestCasts:
    def test_are_those_of_the_autocast_around(self):
        x, *parameters = torch.randn(2, 4), *nn.Linear(4, 4).parameters()
        other = nn.Parameter(torch.randn(4))
        with narrow(), cast_together(x, parameters):
            for p in parameters:
                assert cast_of(x, p).dtype == torch.bfloat16
                assert torch.equal(cast_of(x, p), p.bfloat16())
            assert cast_of(x, other) is other
            with narrow(False):
                assert cast_of(x, parameters[0]) is parameters[0]
            with narrow(dtype=torch.float16):
                assert cast_of(x, parameters[0]) is parameters[0]
        assert cast_of(x, parameters[0]) is parameters[0]

    @pytest.mark.parametrize("kind", ["outside", "float64", "func"])
    def test_there_are_none(self, kind):
        x, *parameters = torch.randn(2, 4), *nn.Linear(4, 4).parameters()
        if kind == "float64":
            parameters[0] = nn.Parameter(parameters[0].double())

        def seen(x):
            with narrow(kind != "outside"), cast_together(x, parameters):
                return torch.tensor([cast_of(x, p) is p for p in parameters])

        assert (torch.func.vmap(seen)(x) if kind == "func" else seen(x)).all()

    def test_end_with_an_error(self):
        x, *parameters = torch.randn(2, 4), *nn.Linear(4, 4).parameters()
        with narrow(), pytest.raises(RuntimeError, match="stop"), cast_together(x, parameters):
            raise RuntimeError("stop")
        assert not casts._CASTS.now

    def test_one_that_nobody_reads_has_no_gradient(self):
        layer, x = Linear(4, 3), torch.randn(2, 4)
        with narrow(), cast_together(x, list(layer.parameters())):
            cast_of(x, layer.weight).sum().backward()
        assert layer.bias.grad is None
        assert torch.equal(layer.weight.grad, torch.ones(3, 4))

    def test_gradients_of_gradients(self):
        layer, x = Linear(4, 3), torch.randn(2, 4)
        weight = layer.weight
        with narrow(), cast_together(x, list(layer.parameters())):
            y = layer(x).square().sum()
        (first,) = torch.autograd.grad(y, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        # The gradient of |r|^2, with r = x W^T + b, is 2 r^T x.
        residual = x @ weight.mT + layer.bias
        expected = 8 * residual.mT @ (x @ x.mT) @ x
        torch.testing.assert_close(
            second, expected, rtol=0.1, atol=0.1 * expected.abs().max().item()
        )


def test_what_has_no_numbers_casts_its_own():
    model = made("flatten_swin_tiny")
    block = next(m for m in model.modules() if isinstance(m, WindowBlock))
    x = torch.randn(2, 8, 8, block.attn.qkv.in_features)
    with narrow():
        expected = block(x)
        tracer = torch.fx.Tracer()
        tracer.is_leaf_module = lambda module, name: True
        traced = torch.fx.GraphModule(block, tracer.trace(block))
        assert torch.equal(traced(x), expected)
        assert block.to("meta")(x.to("meta")).is_meta


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_blocks_run_in_other_ways(how):
    model = made("flatten_swin_tiny")
    block = next(m for m in model.modules() if isinstance(m, WindowBlock))
    x = torch.randn(2, 8, 8, block.attn.qkv.in_features)

    def step(run):
        block.zero_grad()
        with narrow():
            y = run(x)
        y.float().square().sum().backward()
        return [y.detach(), *(p.grad for p in block.parameters())]

    expected = step(block)
    if how == "checkpointed":
        actual = step(lambda x: checkpoint(block, x, use_reentrant=False))
    else:
        actual = step(torch.compile(block, backend="eager", fullgraph=True))
    torch.testing.assert_close(actual, expected)
