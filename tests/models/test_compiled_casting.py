"""Weights of a block are cast together in compiled graphs, too: the same bits, by fewer nodes."""

import threading

import pytest
import torch
from test_casting import BLOCKS, MODELS, made, narrow
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint

from fbila.layers.linear import Linear
from fbila.models import casting
from fbila.models.casting import parameters_of
from fbila.models.window_block import WindowBlock
from fbila.ops import casts
from fbila.ops.casts import cast_of, cast_together

COPIES, CASTS = "aten._foreach_copy.default", "aten._to_copy.default"


@pytest.fixture(autouse=True)
def as_it_was():
    torch._dynamo.reset()
    yield
    assert casts.TRACED == []
    assert casts._CASTS.now == {}


@pytest.fixture
def one_by_one(monkeypatch):
    """A function after which graphs cast nothing together."""

    def change():
        monkeypatch.setattr(casting, "traced_casts", lambda *_: [])
        torch._dynamo.reset()

    return change


@pytest.fixture
def block():
    return next(m for m in made("flatten_swin_tiny").modules() if isinstance(m, WindowBlock))


@pytest.fixture
def x(block):
    return torch.randn(2, 8, 8, block.norm1.weight.numel())


def trained(module, run, x):
    """The answer and the gradients of a step, after which the module is as it was before."""
    state = {name: t.clone() for name, t in module.state_dict().items()}
    module.zero_grad()
    with narrow():
        y = run(x)
    y.float().square().sum().backward()
    module.load_state_dict(state)
    return [y.detach(), *(p.grad for p in module.parameters())]


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert torch.equal(a, b)
            assert b.any()


def compiled(module, **options):
    backend = AotEagerAndRecordGraphs()
    return torch.compile(module, backend=backend, fullgraph=True, **options), backend


def nodes(graphs, target):
    return [sum(str(node.target) == target for node in g.graph.nodes) for g in graphs]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_same_bits_by_fewer_casts(name, one_by_one):
    model, x = made(name), torch.randn(2, 3, 64, 64)
    # Tables of rotations are made once.
    trained(model, model, x)
    run, together = compiled(model)
    actual = trained(model, run, x)
    one_by_one()
    run, alone = compiled(model)
    assert_same_bits(actual, trained(model, run, x))
    blocks = [m for m in model.modules() if isinstance(m, BLOCKS)]
    served = sum(len(parameters_of(block)) for block in blocks)
    for few, many in (
        (together.fw_graphs, alone.fw_graphs),
        (together.bw_graphs, alone.bw_graphs),
    ):
        assert nodes(few, COPIES) == [len(blocks)]
        assert nodes(many, COPIES) == [0]
        assert nodes(many, CASTS)[0] - nodes(few, CASTS)[0] == served


@pytest.mark.parametrize(
    ("kind", "copies"),
    [
        ("some frozen", 1),
        ("all frozen", 0),
        ("float64", 0),
        ("bfloat16", 0),
        ("hook", 1),
        ("shared", 1),
        ("outside", 0),
    ],
)
def test_parameters_of_a_block(block, x, kind, copies):
    if kind == "some frozen":
        block.mlp.fc1.requires_grad_(False)
    elif kind == "all frozen":
        for p in parameters_of(block):
            p.requires_grad_(False)
    elif kind == "hook":
        block.mlp.fc1.register_forward_pre_hook(lambda *_: None)
    elif kind == "shared":
        block.attn.proj.bias = block.mlp.fc2.bias
    elif kind in ("float64", "bfloat16"):
        block, x = block.to(getattr(torch, kind)), x.to(getattr(torch, kind))
    run, seen = compiled(block)
    if kind == "outside":
        assert torch.equal(run(x), block(x))
        assert nodes(seen.fw_graphs, COPIES) == [0]
        return
    assert_same_bits(trained(block, run, x), trained(block, block, x))
    assert nodes(seen.fw_graphs + seen.bw_graphs, COPIES) == [copies, copies]
    if kind == "some frozen":
        (node,) = (n for n in seen.fw_graphs[0].graph.nodes if str(n.target) == COPIES)
        assert len(node.args[0]) == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_serves_frozen_weights_as_well(block, x, mode):
    block.mlp.fc1.requires_grad_(False)
    run, seen = compiled(block)
    with mode(), narrow():
        assert torch.equal(run(x), block(x))
    graphs = seen.fw_graphs or seen.graphs
    copies = [n for n in graphs[0].graph.nodes if "_foreach_copy" in str(n.target)]
    assert [len(n.args[0]) for n in copies] == [8]


def test_autocast_within_the_graph(block, x):
    def forward(x):
        with narrow():
            return block(x)

    run, seen = compiled(forward)
    assert_same_bits(trained(block, run, x), trained(block, block, x))
    assert nodes(seen.fw_graphs, COPIES) == [1]


@pytest.mark.parametrize("enabled", [False, True])
def test_another_autocast_within_has_its_own_casts(enabled):
    layer, x = Linear(4, 3), torch.randn(2, 4)

    def forward(_, x):
        with narrow(enabled, torch.float16):
            return layer(x)

    holder = nn.Module()
    holder.layer, holder.maps = layer, (("layer",),)
    with narrow():
        y = compiled(lambda x: casting.casting(forward)(holder, x))[0](x)
        expected = forward(None, x)
    assert y.dtype == (torch.float16 if enabled else torch.float32)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dynamic", [None, False])
def test_graphs_serve_later_calls(block, x, dynamic):
    run, seen = compiled(block, dynamic=dynamic)
    made = []
    for size in (2, 2, 3, 3, 2):
        some = x[:1].repeat(size, 1, 1, 1)
        assert_same_bits(trained(block, run, some), trained(block, block, some))
        made.append(len(seen.fw_graphs))
    assert made == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("where", ["attn", "mlp.fc1", "norm2"])
def test_a_graph_that_ends_within_a_block(block, x, where):
    found = []

    def hook(*_):
        torch._dynamo.graph_break()
        found.append(len(casts.TRACED))
        if failing:
            raise RuntimeError("stop")

    block.get_submodule(where).register_forward_hook(hook)
    run, failing = torch.compile(block, backend="aot_eager"), False
    expected = trained(block, block, x)
    for failing in (True, False, True, False):
        if failing:
            with pytest.raises(RuntimeError, match="stop"):
                trained(block, run, x)
        else:
            assert_same_bits(trained(block, run, x), expected)
    # Another thread would have found them as well.
    assert not any(found)


def test_an_error_while_a_block_is_traced(block, x):
    def stop(*_):
        raise ValueError("stop")

    def forward(x):
        try:
            return block(x)
        except ValueError:
            return x.new_tensor(len(casts.TRACED))

    handle = block.mlp.register_forward_pre_hook(stop)
    with narrow():
        assert compiled(forward)[0](x) == 0
        with pytest.raises(Exception, match="stop"):
            compiled(block)[0](x)
    handle.remove()
    assert_same_bits(trained(block, compiled(block)[0], x), trained(block, block, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_cast_their_own(block, x, reentrant):
    run, _ = compiled(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    actual = trained(block, run, x.clone().requires_grad_())
    assert_same_bits(actual, trained(block, block, x))


@pytest.mark.parametrize("how", ["call", "grad", "grad of each"])
def test_transforms(block, x, how):
    weights = {name: p.detach() for name, p in block.named_parameters()}

    def loss(weights, x):
        with narrow():
            return torch.func.functional_call(block, weights, (x,)).float().square().sum()

    if how == "call":
        run = loss
    elif how == "grad":
        run = torch.func.grad(loss)
    else:
        run, x = torch.func.vmap(torch.func.grad(loss), (None, 0)), x[:, None]
    torch.testing.assert_close(compiled(run)[0](weights, x), run(weights, x))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_cast_their_own(block, x, strict, recwarn):
    with narrow(), torch.no_grad():
        exported = torch.export.export(block, (x,), strict=strict)
        assert torch.equal(exported.module()(x), block(x))
    assert not [w for w in recwarn if "side effects" in str(w.message)]
    assert not any("foreach" in str(node.target) for node in exported.graph.nodes)


def test_what_has_no_numbers_casts_its_own(block, x):
    block = block.to("meta")
    with narrow():
        assert torch.compile(block, backend="eager", fullgraph=True)(x.to("meta")).is_meta


def test_another_thread_runs_while_one_compiles(block, x):
    expected, found = trained(block, block, x), []
    expected = [expected[0], *(g.clone() for g in expected[1:])]

    def elsewhere():
        with narrow(), torch.no_grad():
            found.append(block(x))

    def backend(graph, _):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return graph

    run = torch.compile(block, backend=backend, fullgraph=True)
    assert_same_bits(trained(block, run, x), expected)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("before", [False, True])
def test_a_compilation_elsewhere_begins_or_ends_within_a_block(x, before, monkeypatch):
    parameters = list(nn.Linear(4, 4).parameters())
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", before)
    with narrow(), cast_together(x, parameters):
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", not before)
    assert cast_of(x, parameters[0]) is parameters[0]
