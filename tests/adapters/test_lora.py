"""A LoRA stays on a UNet's attention, loaded before LinFusion was mounted or after."""

import copy

import pytest
import tiny_models
import torch
from peft import LoraConfig
from untouched import untouched

from fbila import LinFusion
from fbila.adapters import AdapterError

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(unet, name="first", seed=5, **options):
    """As `load_lora_weights` does, with random weights that are the same for every UNet."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=TARGETS, init_lora_weights=False, **options
    )
    unet.add_adapter(config, adapter_name=name)
    for key, parameter in sorted(unet.named_parameters()):
        if f".{name}." in key:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape))
    return unet


def remove_loras(unet):
    unet.unload_lora()


def mount(unet):
    return LinFusion.construct_for(unet=unet, load_pretrained=False)


def test_loaded_before_is_as_loaded_after(unet):
    other = copy.deepcopy(unet)
    before = mount(add_lora(unet))
    mount(other)
    add_lora(other)
    linear = tiny_models.predict(unet)
    assert torch.equal(linear, tiny_models.predict(other))
    assert len([k for k in unet.state_dict() if "attn1" in k and "lora_A" in k]) == 4 * 6
    unet.disable_adapters()
    assert not torch.allclose(tiny_models.predict(unet), linear, atol=1e-4)
    assert before.report.added_parameters == mount(tiny_models.small_unet()).report.added_parameters


@pytest.mark.parametrize("loaded", ["before", "after"])
@pytest.mark.parametrize("unloaded", ["never", "mounted", "unmounted"])
def test_after_unmounting_nothing_tells(unet, loaded, unloaded):
    plain = add_lora(copy.deepcopy(unet))
    if loaded == "before":
        add_lora(unet)
    linfusion = mount(unet)
    if loaded == "after":
        add_lora(unet)
    if unloaded == "mounted":
        remove_loras(unet)
    linfusion.unmount()
    if unloaded == "unmounted":
        remove_loras(unet)
    if unloaded != "never":
        remove_loras(plain)
    assert list(unet.state_dict()) == list(plain.state_dict())
    assert torch.equal(tiny_models.predict(unet), tiny_models.predict(plain))


def test_a_lora_taken_off_again_leaves_the_linear_model(unet):
    linfusion = mount(unet)
    linear = tiny_models.predict(unet)
    linfusion.unmount()
    add_lora(unet)
    linfusion.mount_to(unet)
    assert not torch.allclose(tiny_models.predict(unet), linear, atol=1e-4)
    remove_loras(unet)
    assert torch.equal(tiny_models.predict(unet), linear)
    linfusion.unmount()
    linfusion.mount_to(unet)
    assert torch.equal(tiny_models.predict(unet), linear)


def change(unet, what):
    if what == "disable":
        unet.disable_adapters()
    elif what == "second":
        add_lora(unet, "second", seed=6)
        unet.set_adapters(["first", "second"], [0.5, 0.25])
    elif what == "delete":
        add_lora(unet, "second", seed=6)
        unet.delete_adapters("first")
        unet.set_adapters("second")
    elif what == "fuse":
        unet.fuse_lora(lora_scale=0.5)
    elif what == "fuse and unfuse":
        unet.fuse_lora()
        unet.unfuse_lora()
    elif what == "fuse and unload":
        unet.fuse_lora()
        remove_loras(unet)


CHANGES = ["disable", "second", "delete", "fuse", "fuse and unfuse", "fuse and unload"]


@pytest.mark.parametrize("when", ["before", "mounted", "disabled"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_done_to_a_lora_is_done_to_both(unet, what, when):
    """The softmax model then equals one that never saw LinFusion."""
    plain = add_lora(copy.deepcopy(unet))
    add_lora(unet)
    if when == "before":
        change(unet, what)
    linfusion = mount(unet)
    if when == "mounted":
        change(unet, what)
    if when == "disabled":
        with linfusion.disabled():
            change(unet, what)
    linear = tiny_models.predict(unet)
    change(plain, what)
    softmax = tiny_models.predict(plain)
    # Bit for bit, but where what was added to the other model's weights was taken away again.
    rounding = 2e-6 if (what, when) == ("fuse and unfuse", "mounted") else 0
    with linfusion.disabled():
        torch.testing.assert_close(tiny_models.predict(unet), softmax, rtol=0, atol=rounding)
    assert torch.equal(tiny_models.predict(unet), linear)
    linfusion.unmount()
    torch.testing.assert_close(tiny_models.predict(unet), softmax, rtol=0, atol=rounding)

    if what != "fuse and unload":  # the weights are then other ones, which LinFusion cannot have
        other = add_lora(tiny_models.small_unet())
        mount(other)
        change(other, what)
        torch.testing.assert_close(linear, tiny_models.predict(other), rtol=0, atol=2e-6)


def test_a_lora_is_trained_on_whichever_module_is_there(unet):
    add_lora(unet)
    linfusion = mount(unet)
    unet(**tiny_models.unet_inputs(unet)).sample.square().mean().backward()
    mounted = unet.get_submodule(LAYER).to_v.lora_A["first"].weight
    assert mounted.grad.abs().max() > 0
    linfusion.unmount()
    assert unet.get_submodule(LAYER).to_v.lora_A["first"].weight is mounted


def test_a_copy_has_a_lora_of_its_own(unet):
    linfusion = mount(add_lora(unet))
    linear = tiny_models.predict(unet)
    clone = copy.deepcopy(unet)
    remove_loras(unet)
    linfusion.unmount()
    assert torch.equal(tiny_models.predict(clone), linear)


@pytest.mark.parametrize("mounted", [True, False])
def test_the_saved_weights_are_without_it(unet, mounted, tmp_path):
    linfusion = mount(unet)
    linfusion.save_pretrained(tmp_path / "plain")
    add_lora(unet)
    if not mounted:
        linfusion.unmount()
    linear = tiny_models.predict(unet)
    linfusion.save_pretrained(tmp_path / "lora")
    assert torch.equal(tiny_models.predict(unet), linear)
    plain, again = (LinFusion.from_pretrained(tmp_path / name) for name in ("plain", "lora"))
    assert list(plain.state_dict()) == list(again.state_dict())
    for key, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


def test_fused_weights_are_not_saved(unet, tmp_path):
    linfusion = mount(add_lora(unet))
    unet.fuse_lora()
    with pytest.raises(AdapterError, match=r"A LoRA is fused into 0\.to_q"):
        linfusion.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    unet.unfuse_lora()
    linfusion.save_pretrained(tmp_path)


def test_an_adapter_of_another_kind_is_refused(unet):
    from peft import LoHaConfig

    unet.add_adapter(LoHaConfig(r=2, target_modules=["to_v"]))
    message = r"attn1\.to_v carries a Linear of Linear \(peft\.tuners\.loha\.layer\)"
    with untouched(unet), pytest.raises(AdapterError, match=message):
        mount(unet)
