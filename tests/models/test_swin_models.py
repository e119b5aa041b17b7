"""FLatten-Swin and PolaFormer-Swin: official weights, answers and cost, and the surface of timm."""

from functools import partial

import contracts
import pytest
import timm
import torch

import fbila.models  # noqa: F401
from fbila.layers import InLineAttention
from fbila.models.grid_block import GridBlock

# Entries of the official state dict, the digest of their names and shapes, parameters, billions of
# multiplications of the official code.
OFFICIAL = {
    "flatten_swin_tiny": (196, "c5847d9716dd075a", 29192384, 4.483341312),
    "flatten_swin_small": (370, "b4dd855724a464e2", 50510288, 8.73364992),
    "flatten_swin_base": (370, "6ec93b6942fd3c9c", 88972488, 15.421313024),
    "flatten_swin_base_384": (370, "b026ac3c9e5ce948", 91433928, 46.382424064),
    "polaformer_swin_tiny": (200, "af71027e81f12e12", 29285696, 4.659459072),
    "polaformer_swin_small": (374, "cd91757ebda26b40", 50603600, 8.90976768),
    "polaformer_swin_base": (374, "6c2f931b8bf958d3", 89137864, 15.707516928),
    "polaformer_swin_base_384": (374, "ae47dc5ab2519a5b", 91599304, 47.223513088),
}
# Millions of parameters and billions of FLOPs, as published of FLatten.
PUBLISHED = {
    "flatten_swin_tiny": (29, 4.5),
    "flatten_swin_small": (51, 8.7),
    "flatten_swin_base": (89, 15.4),
    "flatten_swin_base_384": (91, 46.5),
}
# Windows of 2 x 2 are shifted on the grid of 4 x 4 of stage 3, and not on that of stage 4.
TINY = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_classes": 5}
MAKE = {
    name: partial(timm.create_model, f"{name}_swin_tiny", **TINY)
    for name in ("flatten", "polaformer")
}
each = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def block(name: str, c: int, heads: int, grid: int, window: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official block: without a window, of linear attention."""
    d = c // heads
    projections = {
        "qkv.weight": (3 * c, c),
        "qkv.bias": (3 * c,),
        "proj.weight": (c, c),
        "proj.bias": (c,),
    }
    if window:
        attention = {
            **projections,
            "relative_position_bias_table": ((2 * window - 1) ** 2, heads),
            "relative_position_index": (window**2, window**2),
        }
    else:
        attention = {
            **projections,
            "scale": (1, 1, c),
            "positional_encoding": (1, grid**2, c),
            "dwc.weight": (d, 1, 5, 5),
            "dwc.bias": (d,),
        }
        if name.startswith("polaformer"):
            del attention["qkv.weight"], attention["qkv.bias"]
            attention |= {"qkvg.weight": (4 * c, c), "qkvg.bias": (4 * c,)}
            attention["power"] = (1, heads, 1, d)
    shifted = {}
    if 0 < window < grid:
        shifted["attn_mask"] = ((grid // window) ** 2, window**2, window**2)
    return {
        "norm1.weight": (c,),
        "norm1.bias": (c,),
        **shifted,
        **{f"attn.{n}": shape for n, shape in attention.items()},
        "norm2.weight": (c,),
        "norm2.bias": (c,),
        "mlp.fc1.weight": (4 * c, c),
        "mlp.fc1.bias": (4 * c,),
        "mlp.fc2.weight": (c, 4 * c),
        "mlp.fc2.bias": (c,),
    }


def official_state(model: torch.nn.Module, window: int = 7, grid: int = 56) -> dict:
    """What an official file holds: also tables that follow from the sizes of windows and grids.

    Args:
        model: Any of the models.
        window: Side of its windows.
        grid: Side of the grid of its first stage.
    """
    state = dict(model.state_dict())
    for i in (2, 3):
        side = grid // 2**i
        for j in range(len(model.layers[i].blocks)):
            prefix = f"layers.{i}.blocks.{j}."
            index = torch.zeros(window**2, window**2, dtype=torch.long)
            state[f"{prefix}attn.relative_position_index"] = index
            if j % 2 and side > window:
                mask = torch.zeros((side // window) ** 2, window**2, window**2)
                state[f"{prefix}attn_mask"] = mask
    return state


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_keys_and_cost(name):
    entries, digest, parameters, multiplications = OFFICIAL[name]
    model = contracts.on_meta(name)
    size, window = (384, 12) if name.endswith("384") else (224, 7)
    state = official_state(model, window, size // 4)
    lines = contracts.key_lines(state)
    assert (len(lines), contracts.digest(lines)) == (entries, digest)
    for i, info in enumerate(model.feature_info):
        prefix, c = f"layers.{i}.blocks.1.", info["num_chs"]
        found = {n.removeprefix(prefix): tuple(t.shape) for n, t in state.items() if prefix in n}
        assert found == block(name, c, c // 32, size // 4 // 2**i, window if i > 1 else 0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    counts = contracts.multiplications(model, size)
    assert sum(counts.values()) - counts["norm"] == pytest.approx(multiplications, rel=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_flatten_costs_what_is_published(name):
    millions, flops = PUBLISHED[name]
    _, _, parameters, multiplications = OFFICIAL[name]
    assert round(parameters / 1e6) == millions
    # 46.4 of the largest, of which 46.5 are published.
    assert multiplications == pytest.approx(flops, abs=0.05, rel=0.003)


@each
def test_official_files_load(make, tmp_path):
    official = official_state(contracts.randomize(make()), 2, 16)
    contracts.assert_loads(make, official, tmp_path)
    contracts.assert_refuses_code(make, official, tmp_path)
    contracts.assert_strict(make, official)


def test_tables_are_left_out_wherever_the_model_is():
    model = contracts.randomize(MAKE["flatten"]())
    nested = torch.nn.ModuleDict({"model": MAKE["flatten"]()})
    nested.load_state_dict({f"model.{n}": t for n, t in official_state(model, 2, 16).items()})
    x = contracts.pictures(64, 64)
    assert torch.equal(nested["model"].eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("flatten", [0.16264, 0.179287, 0.907852, -0.048311, 0.05043]),
        ("polaformer", [0.024309, -0.139549, 0.200319, -0.39238, 0.341277]),
    ],
)
@pytest.mark.parametrize("strict", [False, True], ids=["any_size", "strict"])
def test_official_answers(name, official, strict):
    """With windows of 7 x 7 on a grid of 14 x 14, which every other block shifts."""
    model = MAKE[name](img_size=224, window_size=7, strict_img_size=strict)
    contracts.assert_answers(model, (224, 224), official)


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


def test_projections_of_windows_may_be_any_module():
    """Of zeros beyond the grid they make what they make of zeros, a bias or not."""
    model = contracts.randomize(MAKE["flatten"]()).eval()
    # A grid of 5 x 7, and windows of 2 x 2.
    x = contracts.pictures(80, 112)
    with torch.no_grad():
        expected = model(x)
        for block in model.layers[2].blocks:
            block.attn.qkv = torch.nn.Sequential(block.attn.qkv)
        torch.testing.assert_close(model(x), expected)


def test_dropout_of_windows_is_on_where_its_module_is():
    """As for answers by several draws."""
    model = MAKE["flatten"](attn_drop_rate=0.5).eval()
    x = contracts.pictures(64, 64)
    with torch.no_grad():
        expected = model(x)
        for block in model.layers[2].blocks:
            block.attn.attn_drop.train()
        assert not torch.allclose(model(x), expected)
        model.train()
        for block in model.layers[2:].modules():
            if isinstance(block, torch.nn.Dropout):
                block.eval()
        assert torch.equal(model(x), expected)


@each
def test_sizes_for_good(make):
    """Positions and masks made once are those made each time."""
    model = contracts.randomize(make()).eval()
    x = contracts.pictures(96, 48)
    with torch.no_grad():
        expected = model(x)
        model.set_input_size((96, 48), window_size=2)
        assert model.layers[1].blocks[0].attn.positional_encoding.shape == (1, 12 * 6, 48)
        torch.testing.assert_close(model(x), expected)
    strict = make(img_size=(96, 48), strict_img_size=True).eval()
    strict.load_state_dict(model.state_dict())
    torch.testing.assert_close(strict(x).detach(), expected)
    with pytest.raises(AssertionError, match="height"):
        strict(contracts.pictures(64, 64))


def test_windows_grow_with_pictures():
    """To those of the official model for 384 x 384."""
    model = contracts.on_meta("flatten_swin_base")
    larger = contracts.on_meta("flatten_swin_base_384").state_dict()
    model.set_input_size(384)
    assert contracts.key_lines(model.state_dict()) == contracts.key_lines(larger)
    assert model.layers[2].blocks[1].shift_size == (6, 6)


@each
def test_weights_for_another_size(make, tmp_path):
    """Loaded with `img_size` they are those of `set_input_size`."""
    make = partial(make, num_classes=1000)
    model = contracts.randomize(make())
    torch.save({"model": official_state(model, 2, 16)}, tmp_path / "official.pth")
    file = {"file": str(tmp_path / "official.pth")}
    larger = make(pretrained=True, pretrained_cfg_overlay=file, img_size=(128, 192), window_size=4)
    model.set_input_size((128, 192), window_size=4)
    for name, t in larger.state_dict().items():
        assert torch.equal(t, model.state_dict()[name]), name


def test_compiles_shifted_windows_of_any_size():
    model = MAKE["flatten"](attention=(None,), depths=(2,), num_heads=(3,))
    contracts.assert_compiles(model, (64, 96), (96, 160))


def test_compiles_for_one_size():
    contracts.assert_compiles_for_one_size(MAKE["polaformer"](), (64, 64))


@each
def test_traces(make):
    contracts.assert_traces(make(), (64, 64), (50, 90))


@each
def test_checkpoints_gradients(make):
    contracts.assert_checkpoints_gradients(make(), 64, 96)


@each
def test_maps_read_norms(make, monkeypatch):
    contracts.assert_maps_read_norms(make(), monkeypatch, 64, 96)


def test_a_norm_whose_mean_is_taken_is_not_for_maps_alone():
    block = GridBlock(InLineAttention(8, 2), 8)
    assert block.norm2.for_maps and not block.norm1.for_maps


@each
def test_classifier(make):
    contracts.assert_classifier(make, 64, 96)


@each
def test_settings(make):
    contracts.assert_settings(make, 64, 64)


@each
def test_learning_rate_layers(make):
    contracts.assert_learning_rate_layers(make())


def test_weight_decay_leaves_positions_out():
    names = MAKE["flatten"]().no_weight_decay()
    assert names == {
        f"layers.{i}.blocks.{j}.attn.relative_position_bias_table"
        for i, j in ((2, 0), (2, 1), (3, 0))
    }
