"""Gradients go through fused blocks whose own weights are frozen."""

from contextlib import ExitStack

import pytest
import tiny_models
import torch
from block_kernels import assert_near, gradients_of, tiny_unet
from test_fuse import mount
from test_lora import add_lora
from torch import nn

from fbila.adapters import fused_blocks


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
