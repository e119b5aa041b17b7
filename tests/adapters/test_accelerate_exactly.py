"""Where accelerated attention could differ from stock: half precision, guidance, layouts, LoRA."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    SanaMultiscaleLinearAttention,
)
from diffusers.models.transformers.transformer_sana_video import (
    SanaLinearAttnProcessor3_0,
    WanRotaryPosEmbed,
)
from helpers import DEVICE, LOW
from linear_models import CASES
from timm.models.coat import ConvRelPosEnc, FactorAttnConvRelPosEnc
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn

import fbila
from fbila.adapters.acceleration import relu_attention
from fbila.ops import functional, repeated


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(functional, "choose_implementation", lambda *_: "triton")
    monkeypatch.setattr(repeated, "_PASSED", {})


class Holder(nn.Module):
    """A model of one attention module."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *args, **kwargs) -> Tensor:
        return self.attention(*args, **kwargs)


def sana(**settings) -> Holder:
    processor = SanaLinearAttnProcessor2_0()
    options = {"query_dim": 64, "heads": 2, "dim_head": 32, "bias": True, "processor": processor}
    return hold(lambda: Attention(**{**options, **settings}))


def sana_video(heads: int = 2, dim_head: int = 24) -> Holder:
    options = {"qk_norm": "rms_norm_across_heads", "processor": SanaLinearAttnProcessor3_0()}
    return hold(
        lambda: Attention(
            heads * dim_head, heads=heads, dim_head=dim_head, kv_heads=heads, **options
        )
    )


def dc_ae() -> Holder:
    return hold(lambda: SanaMultiscaleLinearAttention(32, 32, attention_head_dim=16))


def lite_mla() -> Holder:
    return hold(lambda: LiteMLA(32, 32, dim=16))


def coat() -> Holder:
    crpe = ConvRelPosEnc(8, 8, {3: 2, 5: 3, 7: 3})
    return hold(lambda: FactorAttnConvRelPosEnc(64, 8, shared_crpe=crpe))


def hold(make) -> Holder:
    torch.manual_seed(0)
    return Holder(make()).eval().to(DEVICE)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def turns(dim_head: int, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    embed = WanRotaryPosEmbed(dim_head, (1, 1, 1), max(frames, height, width))
    return embed.to(DEVICE)(torch.zeros(1, 1, frames, height, width, device=DEVICE))


def error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


MODULES = {
    "Sana": (sana, (normal(2, 300, 64),), {}),
    "SanaVideo": (sana_video, (normal(2, 300, 48),), {"rotary_emb": turns(24, 3, 10, 10)}),
    "DC-AE": (dc_ae, (normal(2, 32, 16, 18),), {}),
    "EfficientViT": (lite_mla, (normal(2, 32, 16, 18),), {}),
    "CoaT": (coat, (normal(2, 1 + 16 * 18, 64),), {"size": (16, 18)}),
}
each_module = pytest.mark.parametrize("name", MODULES)


@each_module
@pytest.mark.parametrize("dtype", LOW, ids=str)
@torch.no_grad()
def test_half_precision_is_as_exact_as_stock(name, dtype, kernels):
    make, (x,), options = MODULES[name]
    model, x = make().to(dtype), x.to(dtype)
    stock = model(x, **options)
    exact = copy.deepcopy(model).double()
    fbila.accelerate(exact)
    truth = exact(x.double(), **options)
    fbila.accelerate(model)
    fast = model(x, **options)
    assert fast.dtype == dtype
    # What both round, both round alike, but for ties of numbers that differ in their last bits.
    assert error(fast, truth) <= 1.01 * error(stock, truth)


@torch.no_grad()
def test_long_videos_are_not_zero_in_float16(kernels):
    model, tables = sana_video(1, 16).half(), turns(16, 20, 32, 32)
    model.attention.norm_q.weight.fill_(5)
    model.attention.norm_k.weight.fill_(5)
    x = normal(1, 20480, 16).half()
    exact = copy.deepcopy(model).double()
    fbila.accelerate(exact)
    truth = exact(x.double(), rotary_emb=tables)
    empty = model(x, rotary_emb=tables) == model.attention.to_out[0].bias
    assert empty.all(-1).double().mean() > 0.99
    fbila.accelerate(model)
    assert error(model(x, rotary_emb=tables), truth) < 2e-3
    stock = sana_video(1, 16)
    stock.load_state_dict(model.state_dict())
    assert error(stock(x.float(), rotary_emb=tables), truth) < 1e-5


@torch.no_grad()
def test_float16_is_clipped_as_in_stock():
    x = normal(2, 40, 64).half()
    model = sana().half()
    model.attention.to_v.weight.mul_(100)
    model.attention.to_out[0].weight.mul_(1e5)
    stock = model(x)
    assert (stock.abs() == 65504).any() and stock.isfinite().all()
    fbila.accelerate(model)
    fast = model(x)
    assert fast.isfinite().all()
    assert error(fast, stock.double()) < 1e-2
    assert torch.equal(fast == 65504, stock == 65504)


@pytest.mark.parametrize(
    ("processor", "batch"),
    [(PAGIdentitySanaLinearAttnProcessor2_0, 4), (PAGCFGSanaLinearAttnProcessor2_0, 6)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_perturbed_guidance(processor, batch, dtype):
    x, model = normal(batch, 40, 64).to(dtype), sana().to(dtype)
    plain = model(x)
    model.attention.set_processor(processor())
    stock = model(x)
    assert error(plain, stock.double()) > 0.1
    with fbila.accelerate(model) as handle:
        assert not handle.report.skipped
        assert error(model(x), stock.double()) < (1e-5 if dtype == torch.float32 else 2e-3)
        # As the pipelines do, which set them for the time of a call.
        model.attention.processor = SanaLinearAttnProcessor2_0()
        assert error(model(x), plain.double()) < (1e-5 if dtype == torch.float32 else 2e-3)
    assert type(model.attention.processor) is SanaLinearAttnProcessor2_0


class Doubled:
    """Another library's processor."""

    def __call__(self, attn, hidden_states, **_):
        return 2 * hidden_states


@torch.no_grad()
def test_a_processor_that_is_set_later_runs():
    x, model = normal(2, 40, 64), sana()
    stock = model(x)
    handle = fbila.accelerate(model)
    model.attention.set_processor(Doubled())
    assert torch.equal(model(x), 2 * x)
    with handle.disabled():
        assert torch.equal(model(x), 2 * x)
    handle.unmount()
    assert torch.equal(model(x), 2 * x)
    model.attention.set_processor(SanaLinearAttnProcessor2_0())
    assert torch.equal(model(x), stock)


@torch.no_grad()
def test_tokens_of_another_sequence_and_masks():
    x, source, model = normal(2, 40, 64), normal(2, 30, 64) + 1, sana()
    mask = torch.zeros(2, 1, 30, device=DEVICE)
    stock = model(x, encoder_hidden_states=source, attention_mask=mask)
    fbila.accelerate(model)
    fast = model(x, encoder_hidden_states=source, attention_mask=mask)
    torch.testing.assert_close(fast, stock, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_norms_that_stay_in_float32():
    x, model = normal(2, 300, 48).half(), sana_video().half()
    model.attention.norm_q.float()
    model.attention.norm_k.float()
    options = {"rotary_emb": turns(24, 3, 10, 10)}
    stock = model(x, **options)
    fbila.accelerate(model)
    fast = model(x, **options)
    assert fast.dtype == stock.dtype == torch.float16
    assert error(fast, stock.double()) < 2e-3


@torch.no_grad()
def test_a_video_without_rotation_fails_as_in_stock():
    model = sana_video()
    fbila.accelerate(model)
    with pytest.raises(UnboundLocalError, match="query_rotate"):
        model(normal(2, 10, 48))


@torch.no_grad()
def test_few_positions_stay_quadratic():
    """There the sums are divided elsewhere, which shows in the last bits."""
    model, x = dc_ae(), normal(2, 32, 4, 4)
    stock = model(x)
    fbila.accelerate(model)
    assert torch.equal(model(x), stock)


@pytest.mark.parametrize("name", ["DC-AE", "EfficientViT"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_pictures_are_read_in_place(name, order, monkeypatch):
    make, (x,), _ = MODULES[name]
    model, x = make().to(memory_format=order), x.contiguous(memory_format=order)
    stock = model(x)
    calls = []

    def attend(q, k, v, **options):
        calls.append((q, k, v))
        return fbila.linear_attn(q, k, v, **options)

    monkeypatch.setattr(relu_attention, "linear_attn", attend)
    made, seen = [], model.attention
    convolutions = seen.aggreg if name == "EfficientViT" else seen.to_qkv_multiscale
    for convolution in convolutions:
        convolution.register_forward_hook(lambda _, args, y: made.extend((args[0], y)))
    fbila.accelerate(model)
    torch.testing.assert_close(model(x), stock, rtol=1e-5, atol=1e-5)
    assert len(calls) == len(made) == 2
    for whole, heads in zip(made, calls, strict=True):
        for number, part in enumerate(heads):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert part.storage_offset() == number * 16 * whole.stride(1)
            assert part.stride()[2:] == (whole.stride(3), whole.stride(1))
    if name == "EfficientViT":
        wanted = 2 if order is torch.contiguous_format else 3
        assert all(part.stride(wanted) == 1 for heads in calls for part in heads)


@torch.no_grad()
def test_heads_are_joined_in_the_order_of_the_picture():
    for q in (normal(2, 3, 8, 20).transpose(2, 3), normal(2, 20, 3, 8).transpose(1, 2)):
        o = fbila.linear_attn(q, q, q, feature_map="relu")
        joined = relu_attention.join_heads([o, o], (4, 5))
        assert torch.equal(joined[:, 24:], o.transpose(2, 3).reshape(2, 24, 4, 5))
        first = q.stride(2) == 1
        order = torch.contiguous_format if first else torch.channels_last
        assert joined.is_contiguous(memory_format=order)
        alone = relu_attention.join_heads([o], (4, 5))
        assert alone.is_contiguous(memory_format=order)
        assert alone.data_ptr() == o.data_ptr()


@pytest.mark.parametrize("name", ["Sana", "EfficientViT", "CoaT"])
@torch.no_grad()
def test_autocast(name):
    make, (x,), options = MODULES[name]
    model = make()
    exact = model(x, **options)
    with torch.autocast(DEVICE, torch.bfloat16):
        stock = model(x, **options)
        fbila.accelerate(model)
        fast = model(x, **options)
    assert fast.dtype == stock.dtype
    assert error(fast, exact.double()) < 1.2 * error(stock, exact.double()) + 1e-3


@pytest.mark.parametrize("first", ["LoRA", "accelerate"])
@torch.no_grad()
def test_lora_on_the_projections(first):
    peft = pytest.importorskip("peft")
    case = CASES["Sana"]
    model, stock = case.make(), case.make()
    config = peft.LoraConfig(
        r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False
    )
    if first == "accelerate":
        fbila.accelerate(model)
    for each in (model, stock):
        torch.manual_seed(3)
        each.add_adapter(config)
    if first == "LoRA":
        fbila.accelerate(model)
    # Frozen, as PEFT leaves the model: products by weights that want a gradient are others, even
    # where none is made.
    plain, expected = case.run(case.make().requires_grad_(False)), case.run(stock)
    assert error(plain, expected.double()) > 1e-3
    torch.testing.assert_close(case.run(model), expected, rtol=1e-5, atol=1e-5)
    fbila.adapters.unswap(model)
    assert torch.equal(case.run(model), expected)
    model.delete_adapters("default")
    assert torch.equal(case.run(model), plain)
