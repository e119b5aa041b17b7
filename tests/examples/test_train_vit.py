"""examples/train_vit.py trains timm's transformers with any attention, and can be interrupted."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fbila import linear_attn

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_vit  # noqa: E402
import vit_attention  # noqa: E402

TINY = (
    "--size 16 --pictures 48 --held-out 20 --batch-size 16 --log-every 2 --mixed-precision no "
    "--model-kwargs patch_size=4 embed_dim=16 depth=2 num_heads=2"
)


def run(output, words=""):
    result = train_vit.main(f"{TINY} --output {output} {words}".split())
    return result, load_file(output / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class TestTraining:
    @pytest.mark.parametrize("attention", ["softmax", "softmax_conv", "focused", "mlla", "rala"])
    def test_each_attention_trains(self, tmp_path, attention):
        result, weights = run(tmp_path, f"--attention {attention} --epochs 2")
        assert result == json.loads((tmp_path / "result.json").read_text())
        assert result["steps"] == [2, 4, 6]
        assert [epoch["step"] for epoch in result["epochs"]] == [3, 6]
        assert result["accuracy"] == result["epochs"][-1]["accuracy"]
        args = train_vit.parse(f"{TINY} --attention {attention}".split())
        torch.manual_seed(0)
        before = train_vit.build(args, 7)
        before_state = before.state_dict()
        assert weights.keys() == before_state.keys()
        unmoved = {k for k in weights if torch.equal(weights[k], before_state[k])}
        assert not unmoved

    def test_other_names(self):
        for name, target in (("MALA", "MALA"), ("relu", "LinearAttention")):
            model = train_vit.build(train_vit.parse(f"{TINY} --attention {name}".split()), 7)
            attention = model.blocks[0].attn
            assert type(getattr(attention, "layer", attention)).__name__ == target

    def test_tokens_are_made_by_convolutions(self, tmp_path):
        small = train_vit.build(train_vit.parse([]), 7)
        assert small.patch_embed.grid_size == (16, 16)
        assert len(small.patch_embed.backbone) == 2
        words = f"{TINY} --stem 1".replace("patch_size=4", "").split()
        result = train_vit.main([*words, "--output", str(tmp_path), "--epochs", "1"])
        assert result["settings"]["stem"] == 1
        model = train_vit.build(train_vit.parse(words), 7)
        assert model.patch_embed.grid_size == (8, 8)
        model.load_state_dict(load_file(tmp_path / "model.safetensors"))

    def test_it_learns(self, tmp_path):
        result, _ = run(
            tmp_path, "--attention focused --pictures 32 --epochs 25 --lr 1e-2 --mixup 0"
        )
        assert result["losses"][-1] < result["losses"][0] - 0.2

    def test_two_calls_are_one(self, tmp_path, monkeypatch):
        straight, weights = run(tmp_path / "straight", "--attention rala --epochs 3")

        class Interrupted(Exception):
            pass

        written = train_vit.save

        def save(state, file):
            written(state, file)
            if state["epoch"] == 2:
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(train_vit, "save", save)
            run(tmp_path / "parts", "--attention rala --epochs 3")
        resumed, again = run(tmp_path / "parts", "--attention rala --epochs 3 --resume")
        assert same(weights, again)
        assert straight["losses"] == resumed["losses"]
        accuracies = [[epoch["accuracy"] for epoch in r["epochs"]] for r in (straight, resumed)]
        assert accuracies[0] == accuracies[1]

    def test_seeds_differ_and_repeat(self, tmp_path):
        one, two, again = (
            run(tmp_path / str(n), f"--epochs 1 --seed {seed}")[1]
            for n, seed in enumerate((0, 1, 0))
        )
        assert same(one, again)
        assert not same(one, two)

    def test_wrong_arguments(self, tmp_path, capsys):
        with pytest.raises(SystemExit, match="fewer training pictures"):
            run(tmp_path, "--batch-size 64")
        with pytest.raises(SystemExit):
            train_vit.parse(["--model-kwargs", "depth"])
        assert "NAME=VALUE" in capsys.readouterr().err


class TestFineTuning:
    def test_layers_start_from_the_softmax_projections(self, tmp_path):
        _, weights = run(tmp_path, "--attention softmax --epochs 1")

        def started(name):
            words = f"{TINY} --attention {name} --start-from {tmp_path}"
            return train_vit.build(train_vit.parse(words.split()), 7).blocks[1].attn

        qkv, proj = (weights[f"blocks.1.attn.{part}.weight"] for part in ("qkv", "proj"))
        focused, mlla, rala = (started(name).layer for name in ("focused", "mlla", "rala"))
        assert torch.equal(focused.qkv.weight, qkv)
        assert torch.equal(focused.proj.weight, proj)
        assert torch.equal(mlla.in_proj.weight, qkv[32:] / 2)
        assert torch.equal(mlla.out_proj.weight, 4 * proj)
        assert torch.equal(rala.qkvo.weight[:48].flatten(1), qkv)
        assert torch.equal(rala.proj.weight.flatten(1), proj)
        x = torch.zeros(1, 16, 16)
        gates = torch.nn.functional.silu(mlla.act_proj(x)), rala.qkvo.bias[48:]
        for gate in gates:
            torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=1e-3)

    def test_mlla_starts_as_linear_attention_of_what_softmax_has(self, monkeypatch):
        # Small enough that SiLU is linear, and nothing left out.
        monkeypatch.setattr(vit_attention, "SMALL", 1e-5)
        monkeypatch.setattr(vit_attention, "LEAST", 0.0)
        softmax = timm.layers.Attention(32, num_heads=2, qkv_bias=True).double()
        with torch.no_grad():
            softmax.qkv.bias.normal_()
        spec = SimpleNamespace(dim=32, heads=2, module=softmax)
        mixer = vit_attention.mlla_of_trained(spec).double()
        nn.init.zeros_(mixer.act_proj.weight)
        x = torch.randn(2, 15, 32, dtype=torch.float64)
        q, k, v = softmax.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        rotary = mixer.attn.rope(3, 5, x)
        o = linear_attn(q, k, v, feature_map="elu1", eps=1e-6, rotary=rotary)
        expected = softmax.proj(o.transpose(1, 2).flatten(2))
        torch.testing.assert_close(mixer(x, 3, 5), expected, rtol=1e-3, atol=1e-3)
