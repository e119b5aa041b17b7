"""What timm and PyTorch do with a backbone they do with a linear one too."""

import os
import shutil

import backbones
import pytest
import timm
import torch
from helpers import CUDA, DEVICE
from timm.layers import set_fused_attn
from timm.models import vision_transformer
from timm.models._features_fx import create_feature_extractor, get_graph_node_names
from timm.optim import param_groups_layer_decay
from timm.utils import AttentionExtract
from torch._dynamo.testing import CompileCounterWithBackend

from fbila import linear_attn, simple_la
from fbila.adapters import AdapterError
from fbila.adapters.timm import LinearAttention, register, swap
from fbila.adapters.timm import rope as timm_rope

CPP_COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
KINDS = ["vit", "prefix", "norms", "eva", "rope, halves", "rope, learned", "rope, grouped"]
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def kernels(monkeypatch):
    """The layers run the ops that they run on a GPU, through Triton's interpreter."""
    if CUDA:
        pytest.skip("kernels are not interpreted where there is a GPU")
    for op in (linear_attn, simple_la):
        monkeypatch.setattr(
            timm_rope, op.__name__, lambda *args, op=op, **kw: op(*args, **kw, impl="triton")
        )


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def predict(model, x=None):
    return model(backbones.picture() if x is None else x)


@each
def test_one_whole_graph(kind):
    model = backbones.MODELS[kind]()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    softmax = predict(compiled)
    handle = swap(model)
    linear = predict(model)
    torch.testing.assert_close(predict(compiled), linear, rtol=0, atol=1e-5)
    handle.unmount()
    assert torch.equal(predict(compiled), softmax)
    with swap(model):
        predict(compiled)
    assert counter.frame_count == 2


def test_kernels_are_one_operator_a_layer(kernels):
    model = backbones.eva(attn_type="rope")
    swap(model)
    expected = predict(model)
    counter = CompileCounterWithBackend("eager")
    torch.testing.assert_close(
        predict(torch.compile(model, backend=counter, fullgraph=True)), expected, rtol=0, atol=1e-5
    )
    (graph,) = counter.graphs
    assert sum("fbila.linear_attn" in str(node.target) for node in graph.graph.nodes) == 2


@pytest.mark.parametrize("kind", ["norms", "rope, grouped", "rope, learned"])
def test_kernels_train_alike(kind, kernels, monkeypatch):
    model = backbones.MODELS[kind]().train()
    swap(model)
    gradients = []
    for _ in range(2):
        loss = model(backbones.picture()).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        monkeypatch.undo()
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@each
def test_compiled_training(kind):
    model = backbones.MODELS[kind]().train()
    swap(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(backbones.picture()).square().sum(), list(model.parameters())),
        torch.autograd.grad(model(backbones.picture()).square().sum(), list(model.parameters())),
        strict=True,
    ):
        assert theirs.any()
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_min_tokens_costs_one_more_graph():
    model = backbones.vit()
    swap(model, min_tokens=15)
    layer, counter = model.blocks[0].attn, CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (8, 12, 14, 15, 24, 40):
        x = torch.randn(2, tokens, 32, device=DEVICE)
        torch.testing.assert_close(predict(compiled, x), predict(layer, x), rtol=0, atol=1e-5)
    assert counter.frame_count == 2


@pytest.mark.skipif(not CPP_COMPILER, reason="needs a C++ compiler")
def test_inductor():
    model = backbones.eva(attn_type="rope", depth=1)
    swap(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(predict(compiled), predict(model), rtol=0, atol=1e-4)


@each
def test_export(kind):
    model = backbones.MODELS[kind]()
    swap(model)
    with torch.no_grad():
        program = torch.export.export(model, (backbones.picture(),))
    torch.testing.assert_close(predict(program.module()), predict(model), rtol=0, atol=1e-5)


@each
def test_features_by_fx(kind):
    """As timm's own tests of it, forward and backward."""
    model = backbones.MODELS[kind]()
    swap(model)
    train_nodes, eval_nodes = get_graph_node_names(model)
    assert any(name.endswith("blocks.0.attn") for name in eval_nodes)
    (output,) = predict(create_feature_extractor(model, [eval_nodes[-1]])).values()
    assert torch.equal(output, predict(model))
    model.train()
    extractor = create_feature_extractor(model, [train_nodes[-1]])
    (output,) = extractor(backbones.picture()).values()
    output.mean().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


@each
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    model = backbones.MODELS[kind]().train()
    swap(model)
    gradients = []
    for wanted in (False, True):
        model.set_grad_checkpointing(wanted)
        loss = model(backbones.picture()).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@each
def test_intermediate_features(kind):
    model = backbones.MODELS[kind]()
    softmax = model.forward_intermediates(backbones.picture(), indices=2)
    swap(model)
    final, linear = model.forward_intermediates(backbones.picture(), indices=2)
    assert torch.equal(final, model.forward_features(backbones.picture()))
    for ours, theirs in zip(linear, softmax[1], strict=True):
        assert ours.shape == theirs.shape
        assert not torch.allclose(ours, theirs, atol=1e-3)


def test_features_only():
    model = timm.create_model("test_vit", features_only=True).eval().to(DEVICE)
    x = backbones.picture(160, 1)
    with torch.no_grad():
        softmax = model(x)
        handle = swap(model)
        assert len(handle.report.swapped) == 6
        linear = model(x)
        handle.unmount()
        again = model(x)
    for before, between, after in zip(softmax, linear, again, strict=True):
        assert torch.equal(before, after)
        assert not torch.equal(before, between)


def test_pruned_blocks_take_their_attention_along():
    model = backbones.vit(depth=4)
    shorter = backbones.vit(depth=4)
    handle = swap(model)
    for pruned in (model, shorter):
        pruned.prune_intermediate_layers([1])
    assert len(model.blocks) == 2
    handle.unmount()
    assert get_types(model) == get_types(shorter)
    assert torch.equal(predict(model), predict(shorter))


def get_types(model):
    return [type(m) for m in model.modules()]


def test_another_input_size():
    model = backbones.vit(dynamic_img_size=True)
    swap(model)
    assert predict(model, torch.randn(1, 3, 40, 88, device=DEVICE)).isfinite().all()
    model.set_input_size((64, 64))
    assert predict(model, backbones.picture(64)).isfinite().all()


def test_layer_decay_groups_are_the_same():
    model = backbones.vit()
    before = param_groups_layer_decay(model)
    swap(model)
    assert [g["params"] for g in param_groups_layer_decay(model)] == [g["params"] for g in before]


def test_patch_dropout_gives_each_picture_its_own_positions():
    model = backbones.eva(attn_type="rope", patch_drop_rate=0.5).train()
    swap(model)
    model(backbones.picture()).sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_the_scaling_kernel_of_timm_makes_no_difference():
    fused = backbones.vit()
    set_fused_attn(False)
    try:
        eager = backbones.vit()
    finally:
        set_fused_attn(True)
    swap(fused)
    swap(eager)
    assert torch.equal(predict(fused), predict(eager))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.trace")
def test_traced():
    model = backbones.vit().requires_grad_(False)
    swap(model)
    traced = torch.jit.trace(model, backbones.picture())
    assert torch.equal(predict(traced), predict(model))


def test_attention_maps_are_refused():
    model = backbones.vit()
    handle = swap(model)
    with pytest.raises(AdapterError) as refusal:
        AttentionExtract(model, method="hook")(backbones.picture())
    assert str(refusal.value) == (
        "blocks.0.attn.attn_drop carries a hook, as timm.utils.AttentionExtract puts there. Linear "
        "attention has no softmax map; use handle.disabled() to extract maps."
    )
    with pytest.raises(RuntimeError, match="No node names found"):
        AttentionExtract(model)
    model = backbones.vit()
    handle = swap(model)
    with handle.disabled():
        AttentionExtract(model, method="hook")


def test_a_lora_before_or_after():
    peft = pytest.importorskip("peft")

    def with_lora(model):
        torch.manual_seed(3)
        return peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["qkv", "proj"], init_lora_weights=False)
        ).eval()

    plain = backbones.vit()
    expected = predict(with_lora(plain))
    first = backbones.vit()
    wrapped = with_lora(first)
    handle = swap(first)
    linear = predict(wrapped)
    handle.unmount()
    assert torch.equal(predict(wrapped), expected)
    then = backbones.vit()
    handle = swap(then)
    wrapped = with_lora(then)
    assert torch.equal(predict(wrapped), linear)
    handle.unmount()
    assert torch.equal(predict(wrapped), expected)
    wrapped.unload()
    assert torch.equal(predict(then), predict(backbones.vit()))


def test_an_attention_layer_of_timms_constructor():
    class Kernel(LinearAttention):
        feature_map = "relu"

    model = timm.create_model("test_vit", attn_layer=Kernel, num_classes=3).eval().to(DEVICE)
    nodes = get_graph_node_names(model)[1]
    x = backbones.picture(160, 1)
    (output,) = predict(create_feature_extractor(model, [nodes[-1]]), x).values()
    assert torch.equal(output, predict(model, x))


def test_an_attention_layer_by_name(monkeypatch):
    monkeypatch.setattr(vision_transformer, "ATTN_LAYERS", dict(vision_transformer.ATTN_LAYERS))

    class ReLUAttention(LinearAttention):
        feature_map = "relu"

    register()
    register()
    register("relu", ReLUAttention)
    for name, layer in (("fbila", LinearAttention), ("relu", ReLUAttention)):
        model = timm.create_model("test_vit", attn_layer=name)
        assert all(type(block.attn) is layer for block in model.blocks)
    for name, taken in (("attn", "Attention"), ("fbila", "LinearAttention")):
        with pytest.raises(AdapterError, match=f"'{name}' is the name of {taken} in timm"):
            register(name, ReLUAttention)
    monkeypatch.delattr(vision_transformer, "ATTN_LAYERS")
    with pytest.raises(AdapterError, match="Pass the class: attn_layer=LinearAttention"):
        register()


def test_timm_keeps_layers_by_name():
    assert vision_transformer.ATTN_LAYERS["attn"] is vision_transformer.Attention
