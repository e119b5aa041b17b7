"""Fused projections compute the same, from the same weights, and can be undone."""

import copy

import pytest
import tiny_models
import torch
from test_lora import add_lora
from torch._dynamo.testing import CompileCounterWithBackend

from fbila import LinFusion
from fbila.adapters import AdapterError
from fbila.layers import GeneralizedLinearAttention

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


def mount(unet, scale=0.05, **options):
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False, **options)
    torch.manual_seed(3)
    for parameter in linfusion.parameters():  # also of the maps that start at zero
        parameter.data += scale * torch.randn_like(parameter)
    return linfusion


@pytest.mark.parametrize("mid_dim", [None, -1, 24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_errs_no_more_than_before(mid_dim, dtype):
    torch.manual_seed(0)
    exact = GeneralizedLinearAttention(64, 2, mid_dim).double()
    x = torch.randn(2, 50, 64, dtype=torch.float64).to(dtype)
    layer = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        expected = exact(x.double())
        plain = (layer(x).double() - expected).abs()
        layer.fuse()
        fused = (layer(x).double() - expected).abs()
    bound = 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert fused.max() <= 1.5 * plain.max() + bound
    assert fused.square().mean().sqrt() <= 1.2 * plain.square().mean().sqrt() + bound / 10


@pytest.mark.parametrize("make", [tiny_models.sd15_unet, tiny_models.sdxl_unet])
def test_a_unet_and_back(make):
    unet = make()
    linfusion = mount(unet, mid_dim_scale=None if make is tiny_models.sd15_unet else 16)
    linear = tiny_models.predict(unet)
    weights = {k: t.clone() for k, t in linfusion.state_dict().items()}
    linfusion.fuse()
    linfusion.fuse()
    fused = tiny_models.predict(unet)
    torch.testing.assert_close(fused, linear, rtol=0, atol=2e-5)
    assert not torch.equal(fused, linear)
    assert linfusion.state_dict().keys() == weights.keys()
    linfusion.unfuse()
    assert torch.equal(tiny_models.predict(unet), linear)
    for key, tensor in linfusion.state_dict().items():
        assert torch.equal(tensor, weights[key])


def test_the_large_weights_are_in_memory_once(unet):
    linfusion = mount(unet)
    linfusion.fuse()
    for layer in linfusion.layers:
        storage = layer.fused.weight.untyped_storage().data_ptr()
        for linear in (layer.to_q, layer.to_k, layer.to_v, layer.to_q_[0], layer.to_k_[0]):
            assert linear.weight.untyped_storage().data_ptr() == storage


@pytest.mark.parametrize("mounted", [True, False])
def test_saving_and_copying_while_fused(unet, mounted, tmp_path):
    linfusion = mount(unet)
    weights = copy.deepcopy(linfusion.state_dict())
    linfusion.fuse()
    clone = copy.deepcopy(unet)
    fused = tiny_models.predict(unet)
    assert torch.equal(tiny_models.predict(clone), fused)
    if not mounted:
        linfusion.unmount()
    linfusion.save_pretrained(tmp_path)
    again = LinFusion.from_pretrained(tmp_path)
    for key, tensor in weights.items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_the_softmax_model_does_not_notice(unet):
    softmax = tiny_models.predict(unet)
    linfusion = mount(unet)
    linfusion.fuse()
    with linfusion.disabled():
        assert torch.equal(tiny_models.predict(unet), softmax)
    unet.to(torch.float64)
    assert tiny_models.predict(unet.float()).isfinite().all()
    linfusion.unmount()
    assert torch.equal(tiny_models.predict(unet), softmax)


def test_gradients_are_refused(unet):
    linfusion = mount(unet)
    linfusion.fuse()
    inputs = tiny_models.unet_inputs(unet)
    with pytest.raises(AdapterError, match=r"gradients enabled, but its projections are fused"):
        unet(**inputs)
    linfusion.unfuse()
    unet(**inputs).sample.square().mean().backward()
    assert all(p.grad is not None for p in linfusion.parameters())


def test_a_lora_has_to_be_in_the_weights(unet):
    linfusion = mount(unet)
    add_lora(unet)
    linear = tiny_models.predict(unet)
    with pytest.raises(AdapterError, match=r"carries a Linear of peft"):
        linfusion.fuse()
    assert not any(layer.fused for layer in linfusion.layers)
    unet.fuse_lora()
    unet.unload_lora()
    linfusion.fuse()
    torch.testing.assert_close(tiny_models.predict(unet), linear, rtol=0, atol=2e-5)
    add_lora(unet)
    with pytest.raises(AdapterError, match=r"A LoRA was loaded on .*attn1, whose projections are"):
        tiny_models.predict(unet)


def test_moving_weights_are_refused(unet):
    linfusion = mount(unet)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(AdapterError, match="under layerwise casting or group offloading"):
        linfusion.fuse()


def test_compiles_as_one_graph():
    # The compiler takes its time over every layer.
    unet = tiny_models.small_unet(layers_per_block=1, mid_block_type=None)
    torch._dynamo.reset()
    linfusion = mount(unet)
    linfusion.fuse()
    expected = tiny_models.predict(unet)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    torch.testing.assert_close(tiny_models.predict(compiled), expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


def test_under_autocast(unet):
    linfusion = mount(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = tiny_models.predict(unet).float()
        linfusion.fuse()
        fused = tiny_models.predict(unet).float()
    assert (fused - plain).norm() <= 0.02 * plain.norm()


@pytest.fixture
def layers():
    """A frozen layer, and the same one fused."""
    torch.manual_seed(0)
    layer = GeneralizedLinearAttention(64, 4).requires_grad_(False)
    fused = copy.deepcopy(layer)
    fused.fuse()
    return layer, fused


@pytest.mark.parametrize("by", ["eager", "compile"])
def test_the_input_may_have_a_gradient(layers, by):
    torch._dynamo.reset()
    gradients = []
    for layer in layers:
        torch.manual_seed(1)
        x = torch.randn(2, 30, 64, requires_grad=True)
        if by == "compile":
            layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-5)


def test_compiled_lengths_share_two_graphs_that_add_in_place(layers):
    torch._dynamo.reset()
    called = []

    def backend(graph, _):
        called.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(layers[1], backend=backend, fullgraph=True)
    with torch.inference_mode():
        for tokens in (30, 49, 64, 81):
            x = torch.randn(2, tokens, 64)
            torch.testing.assert_close(compiled(x), layers[0](x), rtol=0, atol=1e-5)
    assert len(called) == 2
    assert all(any("add_products_" in name for name in names) for names in called)
