"""The low-memory mode gives the same pictures with fewer activations, and can be undone."""

import copy

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.resnet import ResnetBlock2D
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from untouched import untouched

from fbila import LinFusion
from fbila.adapters import AdapterError, kernel_checks, low_memory
from fbila.adapters.unet import memory_blocks
from fbila.ops import group_norm_library


def mount(unet):
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    torch.manual_seed(3)
    for parameter in linfusion.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return linfusion


@pytest.mark.parametrize(
    "make", [tiny_models.sd15_unet, tiny_models.sd21_unet, tiny_models.sdxl_unet]
)
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("tokens", [100, 10**6])
def test_the_same_prediction(make, linear, tokens):
    unet = make()
    if linear:
        mount(unet)
    with untouched(unet):
        expected = tiny_models.predict(unet)
        with low_memory(unet, tokens=tokens):
            for _ in range(2):
                actual = tiny_models.predict(unet)
                torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
        assert torch.equal(tiny_models.predict(unet), expected)


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_pictures_keep_their_order_in_memory(order, monkeypatch):
    """Else each would be copied into the other for the convolution behind it."""
    unet = tiny_models.small_unet().to(memory_format=order)
    sample = torch.randn(1, 4, 16, 16).contiguous(memory_format=order)
    inputs = {**tiny_models.unet_inputs(unet, batch=1), "sample": sample}
    expected = tiny_models.predict(unet, **inputs)
    found, join = [], memory_blocks.join

    def noted(hidden_states, skip):
        joined = join(hidden_states, skip)
        found.extend(x.is_contiguous(memory_format=order) for x in (hidden_states, skip, joined))
        return joined

    monkeypatch.setattr(memory_blocks, "join", noted)
    with low_memory(unet):
        actual = tiny_models.predict(unet, **inputs)
    assert found and all(found)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_norms_by_the_kernel(monkeypatch):
    """As on a GPU: the same, in the memory of what the blocks made themselves."""
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    unet = tiny_models.small_unet()
    expected = tiny_models.predict(unet)
    made = []

    def in_place(x, *options):
        made.append(x.data_ptr())
        y = group_norm_library.group_norm_(x, *options)
        assert y is x
        return y

    monkeypatch.setattr(kernel_checks, "has_kernels", lambda x: True)
    monkeypatch.setattr(
        memory_blocks, "group_norm", lambda *x: group_norm_library.in_kernel(*x, False)
    )
    monkeypatch.setattr(memory_blocks, "group_norm_", in_place)
    with low_memory(unet):
        actual = tiny_models.predict(unet)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    # Both norms of blocks with a shortcut of their own in the upper half, the second of all others.
    resnets = [m for m in unet.modules() if isinstance(m, ResnetBlock2D)]
    joined = [r for block in unet.up_blocks for r in block.resnets if r.conv_shortcut is not None]
    in_middle = len(unet.mid_block.resnets)
    assert len(made) == 2 * (len(resnets) - in_middle + len(joined))


def test_in_half_precision_it_errs_no_more(unet):
    mount(unet)
    exact = tiny_models.predict(unet)
    unet.to(torch.bfloat16)
    inputs = {
        k: v.to(torch.bfloat16) if v.is_floating_point() else v
        for k, v in tiny_models.unet_inputs(unet).items()
    }
    plain = (tiny_models.predict(unet, **inputs) - exact).norm()
    with low_memory(unet):
        ours = (tiny_models.predict(unet, **inputs) - exact).norm()
    assert ours <= 1.2 * plain


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside it that lived at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes.setdefault(storage, storage.nbytes())
        self.most = max(self.most, sum(self.sizes.values()))
        return result


def test_fewer_activations_live_at_a_time(monkeypatch):
    unet = tiny_models.small_unet()
    mount(unet)
    inputs = tiny_models.unet_inputs(unet, side=64)
    with LiveBytes() as plain:
        tiny_models.predict(unet, **inputs)
    # The skip connections would be in the memory of the CPU: here they are not counted.
    parked = []
    monkeypatch.setattr(memory_blocks, "to_host", lambda x: parked.append(x.nbytes) or x.clone())
    with low_memory(unet, tokens=256), LiveBytes() as low:
        tiny_models.predict(unet, **inputs)
    assert low.most - sum(parked) // 2 < plain.most / 4


def test_norms_in_place(monkeypatch):
    monkeypatch.setattr(memory_blocks, "_ELEMENTS", 500)
    norm = torch.nn.GroupNorm(4, 12)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 100 + torch.randn(2, 12, 9, 7)
    with torch.no_grad():
        expected = norm.double()(x.double())
        actual = memory_blocks.norm_(x, norm.float())
    assert actual is x
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-4)


def test_a_pipeline(pipeline_folder):
    def run():
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a", num_inference_steps=2, generator=generator, output_type="latent"
        ).images

    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.set_progress_bar_config(disable=True)
    LinFusion.construct_for(pipeline, load_pretrained=False)
    expected = run()
    mode = low_memory(pipeline)
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-4)
    mode.undo()
    mode.undo()
    assert torch.equal(run(), expected)


def test_a_tuple_is_returned_where_one_is_asked_for(unet):
    with low_memory(unet), torch.no_grad():
        answer = unet(**tiny_models.unet_inputs(unet), return_dict=False)
    assert isinstance(answer, tuple) and answer[0].shape == (2, 4, 16, 16)


def test_a_copy_is_a_mode_of_its_own(unet):
    expected = tiny_models.predict(unet)
    with low_memory(unet):
        clone = copy.deepcopy(unet)
        for parameter in unet.parameters():
            parameter.data.zero_()
        torch.testing.assert_close(tiny_models.predict(clone), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mid_block_additional_residual": torch.zeros(2, 64, 8, 8)}, "takes no mid_block_add"),
        ({"attention_mask": torch.ones(2, 64)}, "takes no attention_mask"),
    ],
)
def test_what_it_does_not_take(unet, arguments, message):
    with low_memory(unet), pytest.raises(AdapterError, match=message):
        tiny_models.predict(unet, **tiny_models.unet_inputs(unet), **arguments)


def test_gradients_freeu_hooks_and_other_models(unet):
    with low_memory(unet):
        with pytest.raises(AdapterError, match=r"Use torch\.no_grad\(\)"):
            unet(**tiny_models.unet_inputs(unet))
        with pytest.raises(AdapterError, match="has been replaced already"):
            low_memory(unet)
        unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
        with pytest.raises(AdapterError, match="has no FreeU"):
            tiny_models.predict(unet)
    with pytest.raises(AdapterError, match="got UNetMotionModel"):
        low_memory(tiny_models.motion_unet())
    with pytest.raises(AdapterError, match="tokens must be positive"):
        low_memory(unet, tokens=0)
    with (
        untouched(
            other := tiny_models.small_unet(
                down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D")
            )
        ),
        pytest.raises(AdapterError, match="does not know AttnDownBlock2D"),
    ):
        low_memory(other)
