"""Convolutions some rows at a time are the same convolutions."""

import pytest
import tiny_models
import torch
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fbila import LinFusion
from fbila.adapters import low_memory
from fbila.adapters.unet import memory_convolution
from fbila.adapters.unet.memory_convolution import by_rows, convolve


@pytest.fixture(autouse=True)
def few_elements(monkeypatch):
    """So that some rows are all that is convolved at a time."""
    monkeypatch.setattr(memory_convolution, "ELEMENTS", 300)


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    times=st.integers(1, 3),
    size=st.tuples(st.integers(7, 20), st.integers(7, 11)),
    last=st.booleans(),
)
def test_any_convolution(kernel, stride, padding, dilation, groups, bias, times, size, last):
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bias, dtype=torch.float64)
    if not by_rows(conv):
        assert padding >= dilation * (kernel - 1) + 1
        return
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 4, *size, dtype=torch.float64).contiguous(memory_format=order)
    enlarged = x.repeat_interleave(times, 2).repeat_interleave(times, 3)
    torch.testing.assert_close(convolve(conv, x, times), conv(enlarged))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_it_lies_in_memory_as_its_input(times, order):
    conv, x = nn.Conv2d(4, 6, 3, padding=1).to(memory_format=order), torch.randn(1, 4, 32, 8)
    y = convolve(conv, x.contiguous(memory_format=order), times)
    assert y.is_contiguous(memory_format=order)


def test_rows_are_few(monkeypatch):
    conv, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 32, 8)
    seen = []
    inner = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, *rest: seen.append(x.shape) or inner(x, *rest)
    )
    convolve(conv, x)
    # 300 // (8 * (4 + 4)) rows at a time, and one more on either side.
    assert [shape[2] for shape in seen] == [6] * 8


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 4, 3),
        type("Other", (nn.Conv2d,), {})(4, 4, 3),
    ],
    ids=str,
)
def test_what_it_does_not_compute(conv):
    assert not by_rows(conv)


def test_the_dtype_of_autocast():
    conv, x = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 32, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(conv, x).dtype == conv(x).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [tiny_models.sd15_unet, tiny_models.sdxl_unet])
def test_a_unet(make):
    unet = make()
    LinFusion.construct_for(unet=unet, load_pretrained=False)
    expected = tiny_models.predict(unet)
    with low_memory(unet) as mode:
        actual = tiny_models.predict(unet)
        # All of them run another way.
        convolutions = {m for m in unet.modules() if isinstance(m, nn.Conv2d | Upsample2D)}
        assert convolutions <= set(mode.modules)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_a_replaced_convolution_is_left_alone():
    unet = tiny_models.small_unet()
    expected = tiny_models.predict(unet)
    inner = unet.conv_in.forward
    unet.conv_in.forward = lambda x: 2 * inner(x)
    doubled = tiny_models.predict(unet)
    assert not torch.allclose(doubled, expected, atol=1e-3)
    with low_memory(unet):
        torch.testing.assert_close(tiny_models.predict(unet), doubled, rtol=0, atol=2e-5)
    assert torch.equal(tiny_models.predict(unet), doubled)
