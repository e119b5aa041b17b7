"""Fused blocks give the same pictures by fewer kernels, and can be undone."""

import copy
import io
import pickle
from contextlib import ExitStack

import pytest
import tiny_models
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from block_kernels import assert_near, predict, tiny_unet
from diffusers import ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from helpers import CUDA
from test_fuse import mount
from test_lora import add_lora
from torch import nn
from untouched import untouched

from fbila.adapters import AdapterError, fused_blocks, low_memory
from fbila.adapters.unet.blocks import FusedBlocks

# Those that a small UNet has: 22 of its GroupNorms are in residual blocks.
COUNTS = {"ResnetBlock2D": 12, "Transformer2DModel": 6, "GEGLU": 6, "LayerNorm": 18, "GroupNorm": 1}


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
