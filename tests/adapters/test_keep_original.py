"""Where the UNet's own layers wait while LinFusion's are in their place."""

import gc
import weakref

import pytest
import tiny_models
import torch
from helpers import DEVICE
from untouched import untouched

from fbila import LinFusion
from fbila.adapters import AdapterError, get_handle, unswap
from fbila.adapters.swap import SwapHandle

LOST = "The originals were not kept .* Reload the UNet2DConditionModel to get softmax attention"


def predict(unet):
    """On the UNet's device."""
    weight = next(unet.parameters())
    inputs = tiny_models.unet_inputs(unet)
    return tiny_models.predict(unet, **{name: x.to(weight.device) for name, x in inputs.items()})


def construct(unet, keep_original):
    return LinFusion.construct_for(unet=unet, load_pretrained=False, keep_original=keep_original)


def devices(modules):
    return {p.device.type for module in modules for p in module.parameters()}


@pytest.fixture
def unet(unet):
    return unet.to(DEVICE)


@pytest.fixture
def moves(monkeypatch):
    """Where each original is sent."""
    made = []
    move = SwapHandle._move

    def recorded(self, module, device):
        made.append((module, device.type))
        move(self, module, device)

    monkeypatch.setattr(SwapHandle, "_move", recorded)
    return made


def test_in_the_memory_of_the_cpu(unet, moves):
    with untouched(unet):
        softmax = predict(unet)
        linfusion = construct(unet, "cpu")
        originals = list(get_handle(unet).originals.values())
        assert moves == [(module, "cpu") for module in originals]
        assert devices(originals) == {"cpu"} and devices(linfusion.layers) == {DEVICE}
        linear = predict(unet)
        moves.clear()
        for _ in range(2):
            with linfusion.disabled():
                assert devices(originals) == {DEVICE}
                assert torch.equal(predict(unet), softmax)
            assert devices(originals) == {"cpu"}
            assert torch.equal(predict(unet), linear)
        assert moves == 2 * [(m, device) for device in (DEVICE, "cpu") for m in originals]
        linfusion.unmount()
        assert devices(originals) == {DEVICE}
        assert torch.equal(predict(unet), softmax)


def test_what_was_cast_meanwhile_comes_back_cast(unet):
    linfusion = construct(unet, "cpu")
    unet.double()
    linfusion.unmount()
    assert {p.dtype for p in unet.parameters()} == {torch.float64}


def test_a_refusal_leaves_them_there(unet):
    linfusion = construct(unet, "cpu")
    handle = get_handle(unet)
    name, layer = next(iter(handle.modules.items()))
    unet.set_submodule(name, torch.nn.Identity())
    with pytest.raises(AdapterError, match="is now a Identity"):
        linfusion.unmount()
    assert devices(handle.originals.values()) == {"cpu"} and linfusion.mounted
    unet.set_submodule(name, layer)
    linfusion.unmount()


def test_without_room_they_stay_where_they_were(unet, moves, monkeypatch):
    linfusion = construct(unet, "cpu")
    originals = list(get_handle(unet).originals.values())
    moves.clear()
    move = SwapHandle._move

    def full(self, module, device):
        if module is originals[2] and len(moves) == 2:
            moves.append((module, "nowhere"))
            raise torch.OutOfMemoryError("no room")
        move(self, module, device)

    monkeypatch.setattr(SwapHandle, "_move", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        linfusion.unmount()
    assert moves[3:] == [(module, "cpu") for module in originals]
    assert devices(originals) == {"cpu"} and linfusion.mounted
    linfusion.unmount()


def test_nowhere(unet, tmp_path):
    expected = predict(construct(unet, "device")._handle.model)
    unswap(unet)
    name = next(n for n, _ in unet.named_modules() if n.endswith("attn1"))
    original = weakref.ref(unet.get_submodule(name))
    linfusion = construct(unet, "none")
    gc.collect()
    assert original() is None
    assert linfusion.report.kept_bytes == 0 and "originals kept: 0 MiB" in str(linfusion.report)
    for undo in (
        linfusion.unmount,
        lambda: unswap(unet),
        lambda: linfusion.disabled().__enter__(),
        lambda: linfusion.check(**tiny_models.unet_inputs(unet)),
        lambda: unet.save_pretrained(tmp_path / "unet"),
    ):
        with pytest.raises(AdapterError, match=LOST):
            undo()
    assert linfusion.mounted and torch.equal(predict(unet), expected)
    linfusion.save_pretrained(tmp_path / "linfusion")
    saved = LinFusion.from_pretrained(tmp_path / "linfusion").state_dict()
    for name, weight in linfusion.state_dict().items():
        assert torch.equal(saved[name].to(DEVICE), weight)


def test_on_the_device_nothing_moves(unet, moves):
    linfusion = construct(unet, "device")
    with linfusion.disabled():
        pass
    linfusion.unmount()
    assert moves == []


@pytest.mark.parametrize("way", ["construct_for", "mount_to"])
def test_no_such_place(unet, way):
    linfusion = construct(unet, "device")
    linfusion.unmount()
    words = 'keep_original must be one of "device", "cpu", "none", got \'disk\''
    with untouched(unet), pytest.raises(AdapterError, match=words):
        if way == "construct_for":
            construct(unet, "disk")
        else:
            linfusion.mount_to(unet=unet, keep_original="disk")
