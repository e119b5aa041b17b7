"""RAVLT-T to -L hold the official weights, cost what is published, and serve as timm's do."""

from copy import deepcopy
from functools import partial

import contracts
import pytest
import timm
import torch

import fbila.models  # noqa: F401
from fbila.ops import layer_scale, rotated_parts
from fbila.ops.autograd import ordinary

# Entries of the official state dict, the digest of their names and shapes, parameters, FLOPs with
# and without the products of attention. Published are 15M, 26M, 48M and 95M parameters, and 2.4G,
# 4.6G, 9.9G and 16.0G FLOPs, which are those of the convolutions.
OFFICIAL = {
    "ravlt_tiny": (302, "96fa935cd896f849", 14897768, 2.63, 2.4),
    "ravlt_small": (462, "87f84477c764f321", 25591208, 4.90, 4.6),
    "ravlt_base": (622, "dafd2e9a69d76ffe", 48241288, 10.62, 9.9),
    "ravlt_large": (822, "af396dcb8c9fa7ef", 95242440, 17.26, 16.0),
}
TINY = {
    "dims": (16, 16, 32, 40),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 2, 2),
    "projection": 48,
    "num_classes": 5,
}
make = partial(timm.create_model, "ravlt_tiny", **TINY)


def block(c: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of an official block, whichever its attention."""
    hidden = int(3.5 * c)
    return {
        "gamma_1": (1, c, 1, 1),
        "gamma_2": (1, c, 1, 1),
        "norm1.norm.weight": (c,),
        "norm1.norm.bias": (c,),
        "attn.qkvo.weight": (4 * c, c, 1, 1),
        "attn.qkvo.bias": (4 * c,),
        "attn.lepe.weight": (c, 1, 5, 5),
        "attn.lepe.bias": (c,),
        "attn.proj.weight": (c, c, 1, 1),
        "attn.proj.bias": (c,),
        "norm2.norm.weight": (c,),
        "norm2.norm.bias": (c,),
        "ffn.fc1.weight": (hidden, c, 1, 1),
        "ffn.fc1.bias": (hidden,),
        "ffn.fc2.weight": (c, hidden, 1, 1),
        "ffn.fc2.bias": (c,),
        "ffn.dwconv.weight": (hidden, 1, 3, 3),
        "ffn.dwconv.bias": (hidden,),
        "pos.weight": (c, 1, 3, 3),
        "pos.bias": (c,),
    }


def official_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What an official file holds: for each stage also `RoPE.angle`, each frequency twice."""
    state = dict(model.state_dict())
    for i, stage in enumerate(model.layers):
        attn = stage.blocks[0].attn
        head_dim = attn.lepe.out_channels // attn.num_heads
        angle = 1 / 10000 ** torch.linspace(0, 1, head_dim // 4)
        state[f"layers.{i}.RoPE.angle"] = angle[:, None].expand(-1, 2).flatten()
    return state


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_keys_and_published_cost(name):
    entries, digest, parameters, flops, convolutions = OFFICIAL[name]
    model = contracts.on_meta(name)
    state = official_state(model)
    lines = contracts.key_lines(state)
    assert (len(lines), contracts.digest(lines)) == (entries, digest)
    for i, info in enumerate(model.feature_info):
        prefix = f"layers.{i}.blocks.1."
        found = {n.removeprefix(prefix): tuple(t.shape) for n, t in state.items() if prefix in n}
        assert found == block(info["num_chs"])
    assert sum(p.numel() for p in model.parameters()) == parameters
    counts = contracts.multiplications(model)
    assert sum(counts.values()) == pytest.approx(flops, rel=2e-3)
    # Those of 1 x 1 kernels are products here.
    found = counts["aten.convolution"] + counts["aten.addmm"]
    assert found == pytest.approx(convolutions, abs=0.1)


def test_official_files_load(tmp_path):
    model = contracts.randomize(make())
    official = official_state(model)
    contracts.assert_loads(make, official, tmp_path)
    contracts.assert_refuses_code(make, official, tmp_path)
    contracts.assert_strict(make, official)
    name = "layers.2.RoPE.angle"
    for other in (official[name][:-1], official[name] * 1.1):
        with pytest.raises(RuntimeError, match=f"{name} is not the frequencies"):
            make().load_state_dict(official | {name: other})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*RoPE.other"):
        make().load_state_dict(official | {"layers.0.RoPE.other": official[name]})


def test_official_answers():
    official = [-1.19022, -0.49591, 0.029782, -0.218324, 0.532029]
    contracts.assert_answers(make(), (64, 96), official)


def test_features():
    contracts.assert_features(make, 64, 96)


def test_any_size():
    contracts.assert_any_size(make(), (64, 64), (50, 90), (224, 32))


def test_compiles():
    three_stages = {"dims": (16, 16, 32), "depths": (1, 1, 1), "num_heads": (1, 2, 2)}
    contracts.assert_compiles(make(**three_stages), (64, 96), (96, 128))


def test_traces():
    contracts.assert_traces(make(), (64, 96), (96, 64))


def test_checkpoints_gradients():
    contracts.assert_checkpoints_gradients(make(), 64, 96)


def test_layer_scales_are_kernels_in_training(monkeypatch):
    model, x = contracts.randomize(make()), contracts.pictures(64, 96)
    expected = contracts.gradients(model, x)
    run, calls = layer_scale.in_kernel, []
    monkeypatch.setattr(layer_scale, "direct", ordinary)
    monkeypatch.setattr(layer_scale, "in_kernel", lambda *t: calls.append(0) or run(*t))
    for checkpointing, times in ((False, 1), (True, 2)):
        calls.clear()
        model.set_grad_checkpointing(checkpointing)
        for ours, theirs in zip(contracts.gradients(deepcopy(model), x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert len(calls) == times * 2 * sum(TINY["depths"])


@pytest.mark.parametrize("training", [False, True])
def test_queries_and_keys_are_rotated_by_kernels(training, monkeypatch):
    model, x = contracts.randomize(make()), contracts.pictures(64, 96)
    run = partial(contracts.gradients, model) if training else torch.inference_mode()(model.eval())
    expected, calls = run(x), []
    monkeypatch.setattr(rotated_parts, "direct", ordinary)
    for name in ("in_kernel", "backward_in_kernel"):
        kernel = getattr(rotated_parts, name)
        monkeypatch.setattr(
            rotated_parts, name, lambda *t, kernel=kernel: calls.append(0) or kernel(*t)
        )
    for ours, theirs in zip(run(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(calls) == (1 + training) * sum(TINY["depths"][2:])


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


def test_one_table_a_stage():
    model = make().eval()
    tables = []
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.register_forward_pre_hook(lambda _, args: tables.append(args[1]))
    model(contracts.pictures(64, 96))
    assert len(tables) == 5 and tables[2] is tables[3]
    assert len({id(table) for table in tables}) == 4
