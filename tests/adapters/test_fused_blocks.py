"""Fused blocks give the same pictures by fewer kernels, and can be undone."""

import copy
import io
import pickle
from collections import Counter
from contextlib import ExitStack
from functools import partial

import pytest
import tiny_models
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from helpers import CUDA
from test_fuse import mount
from test_lora import add_lora
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from untouched import untouched

from fbila.adapters import AdapterError, fused_blocks, kernel_checks, low_memory
from fbila.adapters.unet import block_forwards
from fbila.adapters.unet.blocks import FusedBlocks
from fbila.ops import (
    add_bias_library,
    autograd,
    geglu_library,
    group_norm_library,
    group_sizes,
    norm_library,
)

LIBRARIES = {
    "group_norm": group_norm_library,
    "add_bias": add_bias_library,
    "geglu": geglu_library,
    "layer_norm": norm_library,
}
# Those that a small UNet has: 22 of its GroupNorms are in residual blocks.
COUNTS = {"ResnetBlock2D": 12, "Transformer2DModel": 6, "GEGLU": 6, "LayerNorm": 18, "GroupNorm": 1}


@pytest.fixture
def kernels(monkeypatch):
    """Has the blocks run their kernels, through Triton's interpreter; counts the calls."""
    if CUDA:
        pytest.skip("kernels are not interpreted where there is a GPU")
    called = Counter()

    def counted(name):
        function = getattr(LIBRARIES[name], name)

        def run(*args, **kwargs):
            called[name] += 1
            return function(*args, **kwargs)

        return run

    for name, library in LIBRARIES.items():
        monkeypatch.setattr(block_forwards, name, counted(name))
        monkeypatch.setattr(library, "direct", lambda *tensors: True)
    monkeypatch.setattr(kernel_checks, "has_kernels", lambda x: True)
    return called


def tiny_unet(**changes):
    """Two residual blocks, of which one has a shortcut, and a transformer."""
    settings = {
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    }
    return tiny_models.small_unet(**{**settings, **changes})


def predict(unet, side=8, **inputs):
    return tiny_models.predict(unet, **tiny_models.unet_inputs(unet, side=side), **inputs)


def assert_near(actual, expected, atol=5e-6):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("linear", [False, True], ids=["softmax", "linear"])
@pytest.mark.parametrize("as_linear", [False, True], ids=["conv", "linear projections"])
def test_the_same_prediction(kernels, linear, as_linear):
    unet = tiny_models.small_unet(use_linear_projection=as_linear)
    if linear:
        mount(unet).fuse()
    with untouched(unet):
        expected = predict(unet)
        with fused_blocks(unet) as mode:
            assert mode.counts == COUNTS
            assert_near(predict(unet), expected)
            # Each norm, the end of each block, and each feed-forward layer.
            assert kernels == {"group_norm": 31, "add_bias": 18, "geglu": 6, "layer_norm": 18}
        assert mode.counts == {}
        assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize("as_linear", [False, True])
def test_channels_last(kernels, as_linear):
    unet = tiny_unet(use_linear_projection=as_linear)
    expected = predict(unet)
    unet.to(memory_format=torch.channels_last)
    formats = []
    unet.conv_out.register_forward_pre_hook(lambda _, args: formats.append(args[0].stride()[1]))
    with fused_blocks(unet):
        assert_near(predict(unet), expected)
    # The channels stay contiguous all the way.
    assert formats == [1]


def test_on_other_devices_it_is_as_it_comes(unet):
    expected = predict(unet)
    with untouched(unet), fused_blocks(unet):
        assert torch.equal(predict(unet), expected)


def test_in_half_precision_it_errs_no_more(kernels):
    unet = tiny_unet()
    exact = predict(unet)
    unet.half()
    inputs = {
        k: v.half() if v.is_floating_point() else v
        for k, v in tiny_models.unet_inputs(unet, side=8).items()
    }
    plain = (tiny_models.predict(unet, **inputs) - exact).norm()
    with fused_blocks(unet):
        fused = (tiny_models.predict(unet, **inputs) - exact).norm()
    assert 0 < fused <= 1.05 * plain


def test_undone_twice_and_put_on_again(unet):
    kinds = [type(m) for m in unet.modules()]
    for _ in range(2):
        mode = fused_blocks(unet)
        assert [type(m) for m in unet.modules()] != kinds
        mode.undo()
        mode.undo()
        assert [type(m) for m in unet.modules()] == kinds


def test_a_copy_is_fused_and_can_be_undone(kernels):
    unet = tiny_unet()
    expected = predict(unet)
    mode = fused_blocks(unet)
    fused = predict(unet)
    clone = copy.deepcopy(unet)
    loaded = pickle.load(io.BytesIO(pickle.dumps(unet)))
    mode.undo()
    for other in (clone, loaded):
        assert torch.equal(predict(other), fused)
        FusedBlocks(other).undo()
        assert torch.equal(predict(other), expected)


@pytest.mark.parametrize("first", ["fused", "low memory"])
def test_with_low_memory(kernels, first):
    unet = tiny_unet()
    mount(unet)
    expected = predict(unet)
    modes = [fused_blocks, low_memory] if first == "fused" else [low_memory, fused_blocks]
    for undone in (0, 1):
        on = [mode(unet) for mode in modes]
        assert_near(predict(unet), expected)
        on[undone].undo()
        assert_near(predict(unet), expected)
        on[1 - undone].undo()
        assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize("loaded", ["before", "after"])
@pytest.mark.parametrize("as_linear", [False, True])
def test_loras_on_all_that_is_fused(kernels, loaded, as_linear, monkeypatch):
    targets = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in", "proj_out", "proj"]
    monkeypatch.setattr("test_lora.TARGETS", targets)
    unet = tiny_unet(use_linear_projection=as_linear)
    stock = predict(unet)
    adapted = predict(add_lora(copy.deepcopy(unet)))
    assert not torch.allclose(adapted, stock, atol=1e-3)
    if loaded == "before":
        add_lora(unet)
    mode = fused_blocks(unet)
    if loaded == "after":
        add_lora(unet)
    kernels.clear()
    assert_near(predict(unet), adapted)
    # The norms are fused whatever is on the projections.
    assert kernels["group_norm"] == 2 * 6 + 1 + 1
    unet.unload_lora()
    assert_near(predict(unet), stock)
    mode.undo()
    assert torch.equal(predict(unet), stock)


def test_hooks_see_what_they_saw(kernels):
    unet = tiny_unet()
    seen = []
    block = unet.down_blocks[1].resnets[0]
    for module in (block.conv1, block.conv_shortcut, unet.down_blocks[1].attentions[0].proj_out):
        module.register_forward_hook(lambda _, args, out: seen.append(out.clone()))
    predict(unet)
    with fused_blocks(unet):
        predict(unet)
    assert len(seen) == 6
    for before, after in zip(seen[:3], seen[3:], strict=True):
        assert_near(after, before)


def test_hooks_on_norms(kernels):
    unet = tiny_unet()
    block = unet.down_blocks[1].resnets[0]
    block.norm1.register_forward_hook(lambda _, args, out: out * 0)
    unet.down_blocks[1].attentions[0].norm.register_forward_pre_hook(lambda _, args: args[0] + 1)
    expected = predict(unet)
    with fused_blocks(unet):
        assert_near(predict(unet), expected)


def test_seamless_tiling(kernels):
    unet = tiny_unet()
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1] if module.padding[0] else [0] * 4
    expected = predict(unet)
    with fused_blocks(unet):
        assert_near(predict(unet), expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_sequential_offloading(kernels, order):
    unet = tiny_unet()
    expected = predict(unet)
    if order == "before":
        cpu_offload(unet, torch.device("cpu"))
    mode = fused_blocks(unet)
    if order == "after":
        cpu_offload(unet, torch.device("cpu"))
    assert_near(predict(unet), expected)
    mode.undo()
    kernels.clear()
    assert torch.equal(predict(unet), expected)
    remove_hook_from_submodules(unet)
    assert torch.equal(predict(unet), expected)
    assert not kernels


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "casting"])
def test_group_offloading_and_layerwise_casting(kernels, kind, order):
    def put_on(unet):
        if kind == "casting":
            unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
            return
        device = torch.device("cpu")
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        unet.enable_group_offload(device, device, kind, **options)

    unet = tiny_unet()
    other = copy.deepcopy(unet)
    put_on(other)
    expected = predict(other)
    if order == "before":
        put_on(unet)
    mode = fused_blocks(unet)
    if order == "after":
        put_on(unet)
    assert_near(predict(unet), expected)
    mode.undo()
    assert torch.equal(predict(unet), expected)


@pytest.mark.parametrize("name", ["freeu", "tomesd", "deepcache"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_plugins(kernels, pipeline_folder, name, order):
    from test_plugins import PLUGINS

    # The second step is DeepCache's first to leave something out.
    steps = 2 if name == "deepcache" else 1

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a", num_inference_steps=steps, generator=generator, output_type="latent"
        ).images

    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    stock = run()
    undo = PLUGINS[name](pipeline)
    expected = run()
    undo()
    if order == "before":
        undo = PLUGINS[name](pipeline)
    mode = fused_blocks(pipeline)
    if order == "after":
        undo = PLUGINS[name](pipeline)
    assert_near(run(), expected, 1e-4)
    if order == "before":
        undo()
    mode.undo()
    if order == "after":
        assert_near(run(), expected, 1e-4)
        undo()
    kernels.clear()
    assert torch.equal(run(), stock)
    assert not kernels


def test_quantised_weights(kernels):
    quantization = pytest.importorskip("torchao.quantization")
    unet = tiny_unet(use_linear_projection=True)
    quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())
    expected = predict(unet)
    with fused_blocks(unet):
        assert_near(predict(unet), expected, 1e-4)
    assert kernels["add_bias"] == 7


def test_saving_and_a_controlnet(kernels, tmp_path):
    unet = tiny_models.small_unet(layers_per_block=1)
    expected = predict(unet)
    keys = list(unet.state_dict())
    with fused_blocks(unet):
        unet.save_pretrained(tmp_path)
        assert list(unet.state_dict()) == keys
        controlnet = ControlNetModel.from_unet(unet)
    assert not any(type(m).__name__.startswith("Fused") for m in controlnet.modules())
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(predict(loaded), expected)


def gradients_of(unet, leaves, fuse, **inputs):
    """Of a loss by leaves of the graph, in fused blocks or as the UNet comes."""
    with fused_blocks(unet) if fuse else ExitStack():
        loss = unet(**inputs).sample.square().mean()
        return torch.autograd.grad(loss, leaves)


def assert_gradients_near(actual, expected):
    """Within 1e-5 of the largest entry."""
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert_near(x, y, 1e-5 * float(y.abs().max()))


def test_blocks_whose_weights_are_trained_are_as_they_come(kernels):
    unet = tiny_unet().train()
    inputs = tiny_models.unet_inputs(unet, side=8)
    leaves = list(unet.parameters())
    expected, actual = (gradients_of(unet, leaves, fuse, **inputs) for fuse in (False, True))
    assert all(map(torch.equal, actual, expected))
    assert not kernels
    with torch.no_grad(), fused_blocks(unet):
        unet(**inputs)
    assert kernels


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("as_linear", [False, True], ids=["conv", "linear projections"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_the_input_alone(kernels, last, as_linear, training):
    unet = tiny_unet(use_linear_projection=as_linear).requires_grad_(False).train(training)
    if last:
        unet.to(memory_format=torch.channels_last)
    inputs = tiny_models.unet_inputs(unet, side=8)
    leaf = inputs["sample"].requires_grad_()
    expected, actual = (gradients_of(unet, leaf, fuse, **inputs) for fuse in (False, True))
    assert_gradients_near(actual, expected)
    assert kernels == {"group_norm": 14, "add_bias": 7, "geglu": 1, "layer_norm": 3}


def test_gradients_of_some_blocks(kernels):
    """Blocks with trained weights run as they come, those around them by kernels."""
    unet = tiny_unet().requires_grad_(False)
    block = unet.down_blocks[1].resnets[0].requires_grad_(True)
    leaves = list(block.parameters())
    inputs = tiny_models.unet_inputs(unet, side=8)
    expected, actual = (gradients_of(unet, leaves, fuse, **inputs) for fuse in (False, True))
    assert_gradients_near(actual, expected)
    assert kernels == {"group_norm": 12, "add_bias": 6, "geglu": 1, "layer_norm": 3}


@pytest.mark.parametrize("trained", ["norm1", "norm2", "conv1", "conv2", "conv_shortcut"])
def test_gradients_of_one_weight_of_a_block(kernels, trained):
    unet = tiny_unet().requires_grad_(False)
    weight = unet.down_blocks[1].resnets[0].get_submodule(trained).bias.requires_grad_(True)
    inputs = tiny_models.unet_inputs(unet, side=8)
    expected, actual = (gradients_of(unet, weight, fuse, **inputs) for fuse in (False, True))
    assert_gradients_near(actual, expected)


@pytest.mark.parametrize("as_linear", [False, True])
def test_gradients_of_loras(kernels, as_linear, monkeypatch):
    """On the time embedding too, whose gradient is one of a sum over positions."""
    targets = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in", "proj_out", "proj"]
    monkeypatch.setattr("test_lora.TARGETS", targets)
    unet = add_lora(tiny_unet(use_linear_projection=as_linear).requires_grad_(False))
    leaves = [p.requires_grad_() for name, p in unet.named_parameters() if "lora" in name]
    inputs = tiny_models.unet_inputs(unet, side=8)
    expected, actual = (gradients_of(unet, leaves, fuse, **inputs) for fuse in (False, True))
    assert_gradients_near(actual, expected)
    assert kernels["group_norm"] == 14 and kernels["geglu"] == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_distillation(kernels, checkpointing, autocast):
    unet = tiny_unet().requires_grad_(False).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    linfusion = mount(unet).requires_grad_(True)
    leaves = list(linfusion.parameters())
    inputs = tiny_models.unet_inputs(unet, side=8)

    def step(fuse, autocast):
        with (
            fused_blocks(unet) if fuse else ExitStack(),
            torch.autocast("cpu", torch.float16, enabled=autocast),
        ):
            with torch.no_grad(), linfusion.disabled():
                teacher = unet(**inputs).sample
            student = unet(**inputs).sample
            loss = nn.functional.mse_loss(student.float(), teacher.float())
            gradients = torch.autograd.grad(loss * 2**10, leaves)
            return torch.cat([x.flatten() for x in gradients])

    exact, actual = step(False, False), step(True, autocast)
    assert kernels["group_norm"] > 2 * 14 if checkpointing else kernels["group_norm"] == 2 * 14
    # The loss is of the difference of two like predictions, of which both are rounded.
    allowed = 1.1 * (step(False, True) - exact).norm() if autocast else 2e-5 * exact.norm()
    assert 0 < (actual - exact).norm() <= allowed


def test_gradients_of_gradients_are_refused(kernels):
    unet = tiny_unet().requires_grad_(False)
    inputs = tiny_models.unet_inputs(unet, side=8)
    leaf = inputs["sample"].requires_grad_()
    with fused_blocks(unet):
        loss = unet(**inputs).sample.square().mean()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "forward_ad"])
def test_transforms_take_the_stock_blocks(kernels, transform):
    unet = tiny_unet().requires_grad_(False)
    block = unet.down_blocks[1].resnets[0]
    x, temb = torch.randn(2, 16, 6, 6), torch.randn(2, 64)

    def run():
        def apply(x):
            return block(x, temb)

        if transform == "vmap":
            return torch.func.vmap(lambda x: block(x, temb))(x.expand(3, *x.shape))
        if transform == "grad":
            return torch.func.grad(lambda x: apply(x).square().sum())(x)
        if transform == "jvp":
            return torch.func.jvp(apply, (x,), (x,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(apply(dual)).tangent

    expected = run()
    with fused_blocks(unet):
        assert torch.equal(run(), expected)
    assert not kernels


@pytest.mark.parametrize("kept", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("as_linear", [False, True], ids=["conv", "linear projections"])
def test_under_autocast_it_errs_no_more(kernels, kept, as_linear):
    unet = tiny_unet(use_linear_projection=as_linear)
    exact = predict(unet)
    unet.to(kept)
    dtypes = []
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            module.register_forward_hook(lambda _, args, out: dtypes.append(out[0].dtype))
    with torch.autocast("cpu", dtype=torch.float16):
        plain = (predict(unet) - exact).norm()
        expected = [*dtypes]
        dtypes.clear()
        with fused_blocks(unet):
            fused = (predict(unet) - exact).norm()
    assert kernels
    assert 0 < fused <= 1.05 * plain
    assert dtypes == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_under_autocast_return_what_stock_returns(kernels, dtype):
    unet = tiny_unet()
    down = unet.down_blocks[1]
    transformer = partial(down.attentions[0], return_dict=False)
    x, temb = torch.randn(2, 16, 6, 6), torch.randn(2, 64)
    for block, args in (
        (unet.down_blocks[0].resnets[0], (x, temb)),
        (down.resnets[0], (x, temb)),
        (transformer, (x.repeat(1, 2, 1, 1), torch.randn(2, 5, 32))),
    ):
        args = [arg.to(dtype) for arg in args]
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            expected = block(*args)[0]
            with fused_blocks(unet):
                actual = block(*args)[0]
        assert actual.dtype == expected.dtype
        assert_near(actual, expected, 4e-3 * float(expected.abs().max()))
    assert set(kernels) == {"group_norm", "add_bias", "geglu", "layer_norm"}


def test_under_autocast_float64_is_left_alone(kernels):
    unet = tiny_unet().double()
    block, x = unet.down_blocks[1].resnets[0], torch.randn(2, 16, 6, 6, dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16), fused_blocks(unet):
        assert block(x, torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
    assert not kernels


@pytest.mark.parametrize("by", ["compile", "repeated blocks", "export", "trace"])
def test_compiled_it_is_as_it_comes(kernels, by):
    torch._dynamo.reset()
    unet = tiny_unet()
    expected = predict(unet)
    fused_blocks(unet)
    counter = CompileCounterWithBackend("eager")
    if by == "compile":
        compiled = torch.compile(unet, backend=counter, fullgraph=True)
        assert torch.equal(predict(compiled), expected)
        assert counter.frame_count == 1
        assert not kernels
    elif by == "repeated blocks":
        unet.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert_near(predict(unet), expected)
        assert counter.frame_count == 1
        # What is inside the block is compiled, the rest is fused.
        assert set(kernels) == {"group_norm", "add_bias"}
    else:
        inputs = tuple(tiny_models.unet_inputs(unet, side=8).values())
        with torch.no_grad():
            if by == "export":
                actual = torch.export.export(Positional(unet), inputs).module()(*inputs)
            else:
                actual = torch.jit.trace(Positional(unet), inputs, check_trace=False)(*inputs)
        assert torch.equal(actual, expected)
        assert not kernels


def test_compiled_it_keeps_the_kernels_of_long_norms(kernels, monkeypatch):
    torch._dynamo.reset()
    unet = tiny_unet()
    expected = predict(unet)
    fused_blocks(unet)
    # A channel has 64 positions at first and 4 in the end, and groups have 1 to 4 channels.
    monkeypatch.setattr(group_sizes, "LONGEST", 63)
    monkeypatch.setattr(group_norm_library, "direct", autograd.direct)
    called = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    actual = predict(torch.compile(unet, backend=backend, fullgraph=True))
    assert_near(actual, expected)
    assert 0 < sum("fbila.group_norm" in name for name in called) < 31
    assert not any(
        op in name for name in called for op in ("add_bias", "geglu", "fbila.layer_norm")
    )


class Positional(nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, *inputs):
        return self.unet(*inputs, return_dict=False)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")},
        {"act_fn": "gelu"},
        {"resnet_out_scale_factor": 2.0},
        {"resnet_skip_time_act": True},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_other_kinds_of_blocks(kernels, changes):
    unet = tiny_unet(**changes)
    expected = predict(unet)
    with fused_blocks(unet):
        assert_near(predict(unet), expected)


def test_dropout_in_training_mode(kernels):
    unet = tiny_unet(dropout=0.5).train()
    predictions = []
    for fuse in (False, True):
        with fused_blocks(unet) if fuse else ExitStack():
            torch.manual_seed(0)
            predictions.append(predict(unet))
    assert_near(*predictions)


def test_what_cannot_be_fused(unet):
    with fused_blocks(unet), pytest.raises(AdapterError, match="fused already"):
        fused_blocks(unet)
    with pytest.raises(AdapterError, match="is for UNet2DConditionModel, got UNetMotionModel"):
        fused_blocks(tiny_models.motion_unet())
    with pytest.raises(AdapterError, match=r"Expected an nn\.Module or a DiffusionPipeline"):
        fused_blocks(object())
    for module in unet.modules():
        module.forward = module.forward
    with pytest.raises(AdapterError, match="has no blocks that fused_blocks knows"):
        fused_blocks(unet)


def test_a_module_whose_forward_was_replaced_is_left_alone(unet):
    unet.mid_block.resnets[0].forward = lambda *args: args[0] * 0
    expected = predict(unet)
    with fused_blocks(unet) as mode:
        assert mode.counts["ResnetBlock2D"] == COUNTS["ResnetBlock2D"] - 1
        assert torch.equal(predict(unet), expected)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("last", [False, True])
def test_on_a_gpu(dtype, last):
    unet = tiny_models.sd15_unet().cuda()
    inputs = {k: v.cuda() for k, v in tiny_models.unet_inputs(unet, side=32).items()}
    exact = tiny_models.predict(
        copy.deepcopy(unet).double(), **{k: v.double() for k, v in inputs.items()}
    )
    unet.to(dtype)
    if last:
        unet.to(memory_format=torch.channels_last)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    plain = (tiny_models.predict(unet, **inputs) - exact).norm()
    with fused_blocks(unet):
        fused = tiny_models.predict(unet, **inputs)
        assert torch.equal(fused, tiny_models.predict(unet, **inputs))
    assert 0 < (fused - exact).norm() <= 1.2 * plain


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("last", [False, True])
def test_gradients_under_autocast_on_a_gpu(kept, last):
    unet = tiny_models.sd15_unet().cuda().requires_grad_(False).to(kept)
    inputs = {k: v.cuda() for k, v in tiny_models.unet_inputs(unet, side=32).items()}
    leaf = inputs["sample"].requires_grad_()
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    (exact,) = gradients_of(copy.deepcopy(unet).double(), leaf, False, **double)
    if last:
        unet.to(memory_format=torch.channels_last)
    dtypes = []
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            module.register_forward_hook(lambda _, args, out: dtypes.append(out[0].dtype))
    with torch.autocast("cuda", torch.bfloat16):
        plain, fused = (gradients_of(unet, leaf, fuse, **inputs)[0] for fuse in (False, True))
    assert dtypes[: len(dtypes) // 2] == dtypes[len(dtypes) // 2 :]
    assert 0 < (fused - exact).norm() <= 1.2 * (plain - exact).norm()
