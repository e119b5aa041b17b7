"""How far each layer is from softmax, and which masks a layer of LinFusion takes."""

import pytest
import tiny_models
import torch
from untouched import modules

from fbila import LinFusion
from fbila.adapters import AdapterError

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


def mount(unet):
    return LinFusion.construct_for(unet=unet, load_pretrained=False)


def test_the_drift_of_each_layer(unet):
    there = modules(unet)
    inputs, answers = [], []
    original = unet.get_submodule(LAYER)
    hook = original.register_forward_hook(
        lambda _, args, kwargs, output: inputs.append((args, kwargs)) or answers.append(output),
        with_kwargs=True,
    )
    tiny_models.predict(unet)
    hook.remove()
    linfusion = mount(unet)
    mounted = modules(unet)
    drifts = linfusion.check(**tiny_models.unet_inputs(unet))
    assert modules(unet) == mounted
    assert {d.name for d in drifts} == {e.name for e in linfusion.report.swapped}
    assert {d.tokens for d in drifts} == {16 * 16, 8 * 8}
    assert all(d.finite and 0 < d.error < 2 for d in drifts)
    with torch.no_grad():
        ours = unet.get_submodule(LAYER)(*inputs[0][0], **inputs[0][1])
    expected = (ours - answers[0]).norm() / answers[0].norm()
    drift = next(d for d in drifts if d.name == LAYER)
    assert drift.error == pytest.approx(expected.item(), rel=1e-4)
    linfusion.unmount()
    assert modules(unet) == there
    assert not any(m._forward_hooks for m in unet.modules())


def test_an_answer_that_is_not_finite_is_told(unet):
    linfusion = mount(unet)
    unet.get_submodule(LAYER).to_v.weight.data.fill_(float("inf"))
    told = {d.name: d.finite for d in linfusion.check(**tiny_models.unet_inputs(unet))}
    assert [name for name, finite in told.items() if not finite] == [LAYER]


def test_no_drift_without_mounting(unet):
    linfusion = LinFusion(**LinFusion.get_default_config(unet=unet))
    with pytest.raises(AdapterError, match="has not been mounted"):
        linfusion.check(**tiny_models.unet_inputs(unet))


@pytest.mark.parametrize("form", ["bool", "bias", "bias of a row"])
def test_a_hidden_key_is_as_if_absent(unet, form):
    mount(unet)
    layer, x = unet.get_submodule(LAYER), torch.randn(2, 9, 64)
    seen = torch.arange(9)[None] < torch.tensor([[9], [9]]) - 4
    mask = seen if form == "bool" else (1 - seen.float()) * -10000.0
    if form == "bias of a row":
        mask = mask[:, None]
    with torch.no_grad():
        masked = layer(x, attention_mask=mask)
        assert torch.allclose(masked[:, :5], layer(x[:, :5]), atol=1e-6)
        x[:, 5:] = 7.0
        assert torch.equal(layer(x, attention_mask=mask)[:, :5], masked[:, :5])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 9, 9), r"attention_mask \[2, 9, 9\] is no key mask of 9 tokens"),
        (torch.zeros(2, 2, 9, 9), r"attention_mask \[2, 2, 9, 9\] is no key mask"),
        (torch.zeros(4, 1, 9), r"attention_mask \[4, 1, 9\] is no key mask"),
        (torch.full((2, 1, 9), -2.0), "holds biases other than 0 and -10000"),
    ],
)
def test_a_mask_that_does_more_is_refused(unet, mask, message):
    mount(unet)
    with pytest.raises(AdapterError, match=message):
        unet.get_submodule(LAYER)(torch.randn(2, 9, 64), attention_mask=mask)
