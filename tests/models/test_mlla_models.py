"""MLLA-T, -S and -B hold the official weights, cost what is published, and serve as timm's do."""

from functools import partial

import contracts
import pytest
import timm
import torch

import fbila.models  # noqa: F401

# Entries of the official state dict, the digest of their names and shapes, parameters; published
# are 25M, 43M and 96M parameters, and 4.2G, 7.3G and 16.2G FLOPs.
OFFICIAL = {
    "mlla_tiny": (517, "e9c5aa53e4074bdf", 24392200, 4.2),
    "mlla_small": (967, "64de6f18ce82ee06", 43015048, 7.3),
    "mlla_base": (967, "f423b44a39aa509a", 95983960, 16.2),
}
TINY = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "num_classes": 5}
make = partial(timm.create_model, "mlla_tiny", **TINY)


def block(c: int, grid: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official block."""
    return {
        "cpe1.weight": (c, 1, 3, 3),
        "cpe1.bias": (c,),
        "norm1.weight": (c,),
        "norm1.bias": (c,),
        "in_proj.weight": (c, c),
        "in_proj.bias": (c,),
        "act_proj.weight": (c, c),
        "act_proj.bias": (c,),
        "dwc.weight": (c, 1, 3, 3),
        "dwc.bias": (c,),
        "attn.qk.weight": (2 * c, c),
        "attn.qk.bias": (2 * c,),
        "attn.lepe.weight": (c, 1, 3, 3),
        "attn.lepe.bias": (c,),
        "attn.rope.rotations": (grid, grid, c // 2, 2),
        "out_proj.weight": (c, c),
        "out_proj.bias": (c,),
        "cpe2.weight": (c, 1, 3, 3),
        "cpe2.bias": (c,),
        "norm2.weight": (c,),
        "norm2.bias": (c,),
        "mlp.fc1.weight": (4 * c, c),
        "mlp.fc1.bias": (4 * c,),
        "mlp.fc2.weight": (c, 4 * c),
        "mlp.fc2.bias": (c,),
    }


def rotations(grid: int, c: int) -> torch.Tensor:
    """`rope.rotations`: cosine and sine of position * 10000^(-t / (C / 4))."""
    rate = 10000 ** (-torch.arange(c // 4) / (c // 4))
    rows = (torch.arange(grid)[:, None] * rate)[:, None].expand(grid, grid, c // 4)
    columns = (torch.arange(grid)[:, None] * rate)[None].expand(grid, grid, c // 4)
    angles = torch.cat((rows, columns), -1)
    return torch.stack((angles.cos(), angles.sin()), -1)


def official_state(model: torch.nn.Module, size: int = 224) -> dict[str, torch.Tensor]:
    """What an official file holds, whose tables are for pictures of that size."""
    state = dict(model.state_dict())
    for i, stage in enumerate(model.layers):
        width = model.feature_info[i]["num_chs"]
        for j in range(len(stage.blocks)):
            table = rotations(size // 2 ** (i + 2), width)
            state[f"layers.{i}.blocks.{j}.attn.rope.rotations"] = table
    return state


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_keys_and_published_cost(name):
    entries, digest, parameters, flops = OFFICIAL[name]
    model = contracts.on_meta(name)
    state = official_state(model)
    lines = contracts.key_lines(state)
    assert (len(lines), contracts.digest(lines)) == (entries, digest)
    for i, info in enumerate(model.feature_info):
        prefix = f"layers.{i}.blocks.1."
        found = {n.removeprefix(prefix): tuple(t.shape) for n, t in state.items() if prefix in n}
        assert found == block(info["num_chs"], 56 // 2**i)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(contracts.multiplications(model).values()) == pytest.approx(flops, abs=0.06)


def test_official_files_load(tmp_path):
    model = contracts.randomize(make())
    official = official_state(model)
    contracts.assert_loads(make, official, tmp_path)
    contracts.assert_refuses_code(make, official, tmp_path)
    contracts.assert_strict(make, official)
    make().load_state_dict(official_state(model, 384))
    name = "layers.2.blocks.1.attn.rope.rotations"
    with pytest.raises(RuntimeError, match=f"{name} is not the table"):
        make().load_state_dict(official | {name: official[name] + 0.1})


def test_official_answers():
    official = [-0.816294, 0.453351, -0.432081, 0.119864, 0.464573]
    contracts.assert_answers(make(), (64, 64), official)


def test_features():
    contracts.assert_features(make, 64, 96)


def test_any_size():
    contracts.assert_any_size(make(), (64, 64), (50, 90), (224, 32))


def test_compiles():
    contracts.assert_compiles(make(depths=(1, 1), num_heads=(1, 2)), (64, 96), (96, 128))


def test_traces():
    contracts.assert_traces(make(), (64, 96), (96, 64))


def test_checkpoints_gradients():
    contracts.assert_checkpoints_gradients(make(), 64, 96)


def test_low_precision():
    contracts.assert_low_precision(make(), 64, 96)


def test_maps_read_norms(monkeypatch):
    contracts.assert_maps_read_norms(make(), monkeypatch, 64, 96)


def test_classifier():
    contracts.assert_classifier(make, 64, 96)


def test_settings():
    contracts.assert_settings(make, 64, 64)


def test_learning_rate_layers():
    contracts.assert_learning_rate_layers(make())
