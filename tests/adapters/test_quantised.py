"""LinFusion in a UNet whose weights torchao has quantised: with weights of its own."""

import pytest
import tiny_models
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from untouched import modules

from fbila import LinFusion
from fbila.adapters import AdapterError


def quantised():
    unet = tiny_models.small_unet()
    quantize_(unet, Int8WeightOnlyConfig())
    return unet


def test_with_weights_of_its_own(unet, tmp_path):
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    linear = tiny_models.predict(unet)
    linfusion.save_pretrained(tmp_path)

    unet = quantised()
    softmax, there = tiny_models.predict(unet), modules(unet)
    linfusion = LinFusion.construct_for(unet=unet, pretrained_model_name_or_path=tmp_path)
    assert {p.dtype for p in linfusion.parameters()} == {torch.float32}
    mounted = tiny_models.predict(unet)
    # The other layers are quantised.
    assert 0 < (mounted - linear).norm() < 0.05 * linear.norm()
    assert (mounted - linear).norm() < (mounted - softmax).norm()
    with linfusion.disabled():
        assert torch.equal(tiny_models.predict(unet), softmax)
    assert torch.equal(tiny_models.predict(unet), mounted)
    linfusion.fuse()
    torch.testing.assert_close(tiny_models.predict(unet), mounted, rtol=0, atol=2e-5)
    linfusion.unmount()
    assert modules(unet) == there
    assert torch.equal(tiny_models.predict(unet), softmax)


def test_its_weights_cannot_be_copied():
    unet = quantised()
    softmax, there = tiny_models.predict(unet), modules(unet)
    with pytest.raises(AdapterError, match=r"to_q is Linear with .* they cannot be copied"):
        LinFusion.construct_for(unet=unet, load_pretrained=False)
    assert modules(unet) == there
    assert torch.equal(tiny_models.predict(unet), softmax)
