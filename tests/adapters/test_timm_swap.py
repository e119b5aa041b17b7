"""timm's backbones become linear and softmax again, bit for bit, and stay usable in between."""

import copy
import doctest
import pickle

import backbones
import pytest
import timm
import torch
from helpers import DEVICE
from torch import nn
from untouched import modules

from fbila.adapters import AdapterError, get_handle, unswap
from fbila.adapters import timm as adapter
from fbila.adapters.timm import LinearAttention, plan, swap
from fbila.adapters.timm import attention as timm_attention
from fbila.adapters.timm.attention import LINEAR

each = pytest.mark.parametrize(
    "model", backbones.MODELS.values(), ids=backbones.MODELS, indirect=True
)


@pytest.fixture
def model(request):
    return getattr(request, "param", backbones.vit)()


@torch.no_grad()
def predict(model, x=None):
    return model(backbones.picture() if x is None else x)


@pytest.mark.parametrize("module", [adapter, timm_attention], ids=lambda m: m.__name__)
def test_examples_in_docstrings(module):
    failed, tried = doctest.testmod(module)
    assert tried > failed == 0


@each
def test_unmounting_restores_everything(model):
    softmax, there = predict(model), modules(model)
    attributes, keys = set(vars(model)), list(model.state_dict())
    pointers = [t.data_ptr() for t in model.state_dict().values()]
    handle = swap(model)
    assert list(model.state_dict()) == keys
    assert [t.data_ptr() for t in model.state_dict().values()] == pointers
    linear = predict(model)
    assert linear.isfinite().all()
    assert (linear - softmax).norm() > 0.1 * softmax.norm()
    handle.unmount()
    assert modules(model) == there
    assert set(vars(model)) == attributes
    assert torch.equal(predict(model), softmax)
    assert not handle.mounted


@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        ("test_vit", 6), ("test_vit2", 8), ("test_vit3", 9), ("test_vit4", 9),
        ("crossvit_9_240", 12), ("mobilevit_xxs", 9), ("csatv2", 4), ("vitamin_small_224", 14),
        ("deit_tiny_distilled_patch16_224", 12), ("vit_tiny_r_s16_p8_224", 12),
        ("eva02_tiny_patch14_224", 12), ("vit_pe_core_tiny_patch16_384", 12),
    ],
)  # fmt: skip
def test_models_of_timm(name, swapped):
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(DEVICE)
    x = backbones.picture(model.pretrained_cfg["input_size"][-1], 1)
    softmax, there = predict(model, x), modules(model)
    with swap(model) as handle:
        assert len(handle.report.swapped) == swapped
        linear = predict(model, x)
        assert linear.isfinite().all()
        assert not torch.equal(linear, softmax)
    assert modules(model) == there
    assert torch.equal(predict(model, x), softmax)


@each
def test_the_report_is_the_plan(model):
    planned, there = plan(model), modules(model)
    assert modules(model) == there
    handle = swap(model)
    assert handle.report == planned
    assert {e.target for e in planned.swapped} <= {kind.__name__ for kind in LINEAR.values()}
    for entry in planned.swapped:
        module = model.get_submodule(entry.name)
        assert type(module).__name__ == entry.target
        assert (entry.heads, entry.head_dim) == (module.num_heads, module.head_dim)
    assert (planned.added_parameters, planned.kept_bytes) == (0, 0)


@each
def test_disabled_and_with(model):
    softmax = predict(model)
    with swap(model) as handle:
        linear = predict(model)
        with handle.disabled():
            assert torch.equal(predict(model), softmax)
        assert torch.equal(predict(model), linear)
    assert torch.equal(predict(model), softmax)
    with pytest.raises(RuntimeError, match="inside"), swap(model):
        raise RuntimeError("inside")
    assert get_handle(model) is None
    assert torch.equal(predict(model), softmax)


@each
def test_weights_load_strictly_either_way(model):
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    swap(model)
    linear = predict(model)
    model.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(weights, strict=True)
    assert torch.equal(predict(model), linear)


def test_weights_load_into_a_model_made_linear():
    plain = timm.create_model("test_vit").to(DEVICE)
    linear = timm.create_model("test_vit", attn_layer=LinearAttention).to(DEVICE)
    linear.load_state_dict(plain.state_dict(), strict=True)
    swap(plain)
    x = backbones.picture(160, 1)
    assert torch.equal(predict(plain.eval(), x), predict(linear.eval(), x))


@each
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_a_model_of_its_own(model, duplicate):
    softmax = predict(model)
    swap(model)
    linear = predict(model)
    clone = duplicate(model)
    unswap(model)
    assert torch.equal(predict(clone), linear)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.mul_(1.5)
    unswap(clone)
    assert not torch.equal(predict(clone), softmax)
    assert torch.equal(predict(model), softmax)


def test_both_are_one_set_of_weights(model):
    handle = swap(model)
    name = handle.report.swapped[0].name
    original = handle.originals[name]
    model.to(torch.float64).train()
    model.get_submodule(name).norm = nn.LayerNorm(32).double()
    model.get_submodule(name).q_norm.eval()
    assert original.qkv.weight.dtype == torch.float64
    softmax = backbones.picture().double()
    handle.unmount()
    assert model.get_submodule(name) is original
    assert isinstance(original.norm, nn.LayerNorm)
    assert original.training and original.proj.training and not original.q_norm.training
    model(softmax)
    assert torch.equal(handle.modules[name].qkv.weight, original.qkv.weight)


def test_mixed_dtypes_stay_as_they_are(model):
    handle = swap(model)
    model.to(torch.bfloat16)
    model.blocks[0].attn.q_norm = nn.LayerNorm(16)
    handle.unmount()
    assert model.blocks[0].attn.q_norm.weight.dtype == torch.float32
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16


def test_hooks_go_over(model):
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda *_: seen.append("before"))
    with swap(model):
        model.blocks[1].attn.register_forward_hook(lambda *_: seen.append("while"))
        predict(model)
        assert seen == ["before", "while"]
    predict(model)
    assert seen == ["before", "while"] * 2


@each
def test_the_drift_of_each_layer(model):
    handle = swap(model)
    drifts = handle.check(backbones.picture())
    assert [d.name for d in drifts] == [e.name for e in handle.report.swapped]
    assert all(d.finite and 0 < d.error < 10 for d in drifts)
    assert all(d.tokens >= 4 for d in drifts)
    assert predict(model).isfinite().all()


def test_min_tokens(model):
    model = backbones.vit(dynamic_img_size=True)
    small, large = backbones.picture(32), backbones.picture(48)
    softmax = predict(model, small), predict(model, large)
    with swap(model):
        linear = predict(model, large)
    swap(model, min_tokens=18)  # of 17 and 37
    assert torch.equal(predict(model, small), softmax[0])
    assert torch.equal(predict(model, large), linear)


def test_the_class_token_counts_as_any_other():
    model = backbones.vit(dynamic_img_size=True)
    swap(model)
    x = torch.randn(1, 17, 32, device=DEVICE)
    layer = model.blocks[0].attn
    order = torch.randperm(17)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]), rtol=1e-5, atol=1e-5)


def test_a_feature_map(model):
    with swap(model):
        elu1 = predict(model)
    swap(model, "relu")
    assert model.blocks[0].attn.feature_map == "relu"
    assert not torch.allclose(predict(model), elu1, atol=1e-3)


def test_half_precision(model):
    swap(model)
    expected = predict(model)
    for dtype in (torch.bfloat16, torch.float16):
        half = predict(copy.deepcopy(model).to(dtype), backbones.picture().to(dtype))
        assert half.dtype == dtype
        assert (half - expected).norm() < 0.05 * expected.norm()


def test_training_from_the_softmax_weights(model):
    swap(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, losses = backbones.picture(), []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), torch.tensor([1, 3], device=DEVICE))
        loss.backward()
        assert all(p.grad is not None for p in model.blocks.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_module_in_two_places(model):
    model.blocks[2].attn = model.blocks[0].attn
    softmax, there = predict(model), modules(model)
    handle = swap(model)
    assert [e.name for e in handle.report.swapped] == [f"blocks.{i}.attn" for i in range(3)]
    assert model.blocks[2].attn is model.blocks[0].attn
    handle.unmount()
    assert model.blocks[2].attn is model.blocks[0].attn
    assert modules(model) == there
    assert torch.equal(predict(model), softmax)


def test_behind_torch_compile(model):
    compiled = torch.compile(model, backend="eager")
    handle = swap(compiled)
    assert get_handle(model) is get_handle(compiled) is handle
    handle.unmount()


def test_on_the_meta_device():
    with torch.device("meta"):
        model = backbones.vit()
    handle = swap(model)
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)
    handle.unmount()


def test_somebody_else_replaced_one(model):
    handle = swap(model)
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(AdapterError, match=r"blocks\.1\.attn is now a Identity, not the module"):
        handle.unmount()
