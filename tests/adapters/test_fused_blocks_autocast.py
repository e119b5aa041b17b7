"""Fused blocks under autocast: the dtypes are stock's, the errors no larger."""

import copy
from functools import partial

import pytest
import tiny_models
import torch
from block_kernels import assert_near, gradients_of, predict, tiny_unet
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from helpers import CUDA

from fbila.adapters import fused_blocks


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
