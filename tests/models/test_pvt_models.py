"""FLatten-PVT and PolaFormer-PVT: official weights, answers and cost, and the surface of timm."""

from functools import partial

import contracts
import pytest
import timm
import torch

import fbila.models  # noqa: F401

# Entries of the official state dict, the digest of their names and shapes, parameters, billions of
# multiplications of the official code.
OFFICIAL = {
    "flatten_pvt_tiny": (168, "5311fd05c08aa1f2", 12150504, 2.03740672),
    "flatten_pvt_small": (312, "6ec905d2d258320f", 21670248, 4.029945856),
    "polaformer_pvt_tiny": (176, "53f565a11a7ec0fb", 12924648, 2.256500224),
    "polaformer_pvt_small": (328, "ab185015b946b11f", 23157224, 4.46943744),
}
TINY = {"img_size": 64, "embed_dims": (8, 16, 40, 64), "depths": (1, 2, 1, 1), "num_classes": 5}
MAKE = {
    name: partial(timm.create_model, f"{name}_pvt_tiny", **TINY)
    for name in ("flatten", "polaformer")
}
each = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def block(name: str, c: int, heads: int, tokens: int, ratio: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official block."""
    d = c // heads
    if name.startswith("flatten"):
        own = {"q.weight": (c, c), "q.bias": (c,)}
    else:
        own = {"qg.weight": (2 * c, c), "qg.bias": (2 * c,), "power": (1, heads, 1, d)}
    attention = {
        **own,
        "kv.weight": (2 * c, c),
        "kv.bias": (2 * c,),
        "scale": (1, 1, c),
        "positional_encoding": (1, tokens, c),
        "dwc.weight": (d, 1, 5, 5),
        "dwc.bias": (d,),
        "proj.weight": (c, c),
        "proj.bias": (c,),
    }
    return {
        "norm1.weight": (c,),
        "norm1.bias": (c,),
        **{f"attn.{n}": shape for n, shape in attention.items()},
        "norm2.weight": (c,),
        "norm2.bias": (c,),
        "mlp.fc1.weight": (ratio * c, c),
        "mlp.fc1.bias": (ratio * c,),
        "mlp.fc2.weight": (c, ratio * c),
        "mlp.fc2.bias": (c,),
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_keys_and_cost(name):
    entries, digest, parameters, multiplications = OFFICIAL[name]
    model = contracts.on_meta(name)
    state = model.state_dict()
    lines = contracts.key_lines(state)
    assert (len(lines), contracts.digest(lines)) == (entries, digest)
    for i, (c, heads, ratio) in enumerate([(64, 1, 8), (128, 2, 8), (320, 5, 4), (512, 8, 4)]):
        prefix = f"block{i + 1}.0."
        found = {n.removeprefix(prefix): tuple(t.shape) for n, t in state.items() if prefix in n}
        assert found == block(name, c, heads, (56 // 2**i) ** 2, ratio)
    assert sum(p.numel() for p in model.parameters()) == parameters
    counts = contracts.multiplications(model)
    assert sum(counts.values()) - counts["norm"] == pytest.approx(multiplications, rel=1e-9)


def test_flatten_costs_what_is_published():
    for name, millions, flops in (
        ("flatten_pvt_tiny", 12.2, 2.0),
        ("flatten_pvt_small", 21.7, 4.0),
    ):
        _, _, parameters, multiplications = OFFICIAL[name]
        assert (round(parameters / 1e6, 1), round(multiplications, 1)) == (millions, flops)


@each
def test_official_files_load(make, tmp_path):
    official = contracts.randomize(make()).state_dict()
    contracts.assert_loads(make, official, tmp_path)
    contracts.assert_refuses_code(make, official, tmp_path)
    contracts.assert_strict(make, official)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("flatten", [-2.083795, 0.78398, 0.674296, -0.210012, 0.041326]),
        ("polaformer", [-2.347094, -0.430964, -0.254324, 1.035932, -1.366763]),
    ],
)
def test_official_answers(name, official):
    contracts.assert_answers(MAKE[name](sr_ratios=(2, 1, 1, 1)), (64, 64), official)


@each
def test_features(make):
    contracts.assert_features(make, 64, 96)


@each
def test_any_size(make):
    contracts.assert_any_size(make(), (64, 64), (50, 90), (224, 32))


@each
def test_pictures_are_filled_with_zeros(make):
    model = contracts.randomize(make()).eval()
    x = contracts.pictures(62, 94)
    with torch.no_grad():
        filled = model(torch.nn.functional.pad(x, (0, 2, 0, 2)))
        torch.testing.assert_close(model(x), filled)


@each
def test_positions_for_another_size(make):
    """Those made once are those made each time."""
    model = contracts.randomize(make()).eval()
    x = contracts.pictures(96, 32)
    with torch.no_grad():
        expected = model(x)
        model.set_input_size((96, 32))
        assert model.pos_embed1.shape == (1, 24 * 8, 8)
        assert model.block2[1].attn.positional_encoding.shape == (1, 12 * 4, 16)
        torch.testing.assert_close(model(x), expected)
    strict = make(img_size=(96, 32), strict_img_size=True).eval()
    strict.load_state_dict(model.state_dict())
    torch.testing.assert_close(strict(x).detach(), expected)
    with pytest.raises(AssertionError, match="height"):
        strict(contracts.pictures(64, 64))


@each
def test_weights_for_another_size(make, tmp_path):
    """Loaded with `img_size` they are those of `set_input_size`."""
    make = partial(make, num_classes=1000)
    model = contracts.randomize(make())
    torch.save({"model": model.state_dict()}, tmp_path / "official.pth")
    file = {"file": str(tmp_path / "official.pth")}
    larger = make(pretrained=True, pretrained_cfg_overlay=file, img_size=(96, 160))
    model.set_input_size((96, 160))
    for name, t in larger.state_dict().items():
        assert torch.equal(t, model.state_dict()[name]), name


def test_no_norm_after_the_blocks():
    """Published weights have one that no answer depends on, and that is not trained."""
    model = contracts.randomize(MAKE["flatten"]())
    before = model.eval()(contracts.pictures(64, 64))
    torch.nn.init.zeros_(model.norm.weight)
    assert torch.equal(model(contracts.pictures(64, 64)), before)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "norm.weight",
        "norm.bias",
    ]


def test_compiles():
    two = {"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2)}
    contracts.assert_compiles(
        MAKE["flatten"](**two, mlp_ratios=(8, 8), sr_ratios=(1, 1)), (64, 96), (96, 128)
    )


def test_compiles_for_one_size():
    contracts.assert_compiles_for_one_size(MAKE["polaformer"](depths=(1, 1, 1, 1)), (64, 64))


@each
def test_traces(make):
    contracts.assert_traces(make(), (64, 64), (50, 90))


@each
def test_checkpoints_gradients(make):
    contracts.assert_checkpoints_gradients(make(), 64, 96)


@each
def test_maps_read_norms(make, monkeypatch):
    contracts.assert_maps_read_norms(make(sr_ratios=(2, 1, 1, 1)), monkeypatch, 64, 96)


@each
def test_classifier(make):
    contracts.assert_classifier(make, 64, 96)


@each
def test_settings(make):
    contracts.assert_settings(make, 64, 64)


@each
def test_learning_rate_layers(make):
    contracts.assert_learning_rate_layers(make())
