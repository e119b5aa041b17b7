"""VSSD-Micro to -B hold the official weights, cost what is published, and serve as timm's do."""

from functools import partial

import contracts
import pytest
import timm

import fbila.models  # noqa: F401
from fbila.layers import NonCausalSSD

# Entries of the official state dict, the digest of their names and shapes, parameters, published
# FLOPs; published are 14M, 24M, 40M and 89M parameters.
OFFICIAL = {
    "vssd_micro": (379, "af65e07f620028be", 13512964, 2.3),
    "vssd_tiny": (421, "0fad9a12785ffd63", 24270724, 4.5),
    "vssd_small": (730, "d54b13c50039d63d", 40075650, 7.4),
    "vssd_base": (730, "70b6c90da3ee1145", 88823151, 16.1),
}
TINY = {
    "embed_dim": 16,
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 4),
    "d_state": 8,
    "num_classes": 5,
}
make = partial(timm.create_model, "vssd_tiny", **TINY)


def mixer(c: int, heads: int, d_state: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official mixer of the first three stages."""
    mixed = 2 * c + 2 * d_state
    return {
        "attn.dt_bias": (heads,),
        "attn.A_log": (heads,),
        "attn.D": (heads,),
        "attn.in_proj.weight": (2 * c + mixed + heads, c),
        "attn.conv2d.weight": (mixed, 1, 3, 3),
        "attn.conv2d.bias": (mixed,),
        "attn.norm.weight": (2 * c,),
        "attn.norm.bias": (2 * c,),
        "attn.out_proj.weight": (c, 2 * c),
    }


def attention(c: int) -> dict[str, tuple[int, ...]]:
    """Those of the last stage."""
    return {
        "attn.to_qkv.weight": (3 * c, c),
        "attn.to_out.weight": (c, c),
        "attn.to_out.bias": (c,),
    }


def around(c: int) -> dict[str, tuple[int, ...]]:
    """What else there is in a block."""
    return {
        "cpe1.weight": (c, 1, 3, 3),
        "cpe1.bias": (c,),
        "norm1.weight": (c,),
        "norm1.bias": (c,),
        "cpe2.weight": (c, 1, 3, 3),
        "cpe2.bias": (c,),
        "norm2.weight": (c,),
        "norm2.bias": (c,),
        "mlp.fc1.weight": (4 * c, c),
        "mlp.fc1.bias": (4 * c,),
        "mlp.fc2.weight": (c, 4 * c),
        "mlp.fc2.bias": (c,),
    }


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_keys_and_published_cost(name):
    entries, digest, parameters, flops = OFFICIAL[name]
    model = contracts.on_meta(name)
    state = model.state_dict()
    lines = contracts.key_lines(state)
    assert (len(lines), contracts.digest(lines)) == (entries, digest)
    repeated = 0
    for i, info in enumerate(model.feature_info):
        c, attn = info["num_chs"], model.layers[i].blocks[1].attn
        prefix = f"layers.{i}.blocks.1."
        found = {n.removeprefix(prefix): tuple(t.shape) for n, t in state.items() if prefix in n}
        d_state = 48 if name == "vssd_micro" else 64
        own = mixer(c, attn.num_heads, d_state) if i < 3 else attention(c)
        assert found == around(c) | own
        if isinstance(attn, NonCausalSSD):
            products = 2 * (56 // 2**i) ** 2 * d_state * 2 * c
            repeated += len(model.layers[i].blocks) * products * (1 - 1 / attn.num_heads)
    assert sum(p.numel() for p in model.parameters()) == parameters
    # As published, products with the one query and key that all heads share count for one head.
    counts = contracts.multiplications(model)
    assert sum(counts.values()) - repeated / 1e9 == pytest.approx(flops, abs=0.05)


def test_official_files_load(tmp_path):
    model = contracts.randomize(make())
    official = dict(model.state_dict())
    contracts.assert_loads(make, official, tmp_path)
    contracts.assert_refuses_code(make, official, tmp_path)
    contracts.assert_strict(make, official)


def test_official_answers():
    official = [-1.020642, 0.701762, -0.140416, 0.155259, 0.475157]
    contracts.assert_answers(make(), (64, 96), official)


def test_features():
    contracts.assert_features(make, 64, 96)


def test_any_size():
    contracts.assert_any_size(make(), (64, 64), (50, 90), (224, 32))


def test_compiles():
    model = make(depths=(1, 1), num_heads=(1, 2))
    contracts.assert_compiles(model, (64, 96), (96, 128))


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
