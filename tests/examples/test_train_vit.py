"""examples/train_vit.py trains timm's transformers with any attention, and can be interrupted."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import compare_vit  # noqa: E402
import plot_vit  # noqa: E402
import train_vit  # noqa: E402
import vit_data  # noqa: E402

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

    def test_folder(self, tmp_path):
        for split, count in (("train", 12), ("val", 3)):
            for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
                folder = tmp_path / "data" / split / name
                folder.mkdir(parents=True)
                for n in range(count):
                    Image.new("RGB", (24, 20), colour).save(folder / f"{n}.png")
        words = f"--data {tmp_path}/data --workers 0 --epochs 12 --lr 1e-2 --ema 0.5 --mixup 0"
        result, _ = run(tmp_path, f"--batch-size 8 {words}")
        assert result["accuracy"] == 1

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
        assert torch.equal(mlla.in_proj.weight, qkv[32:])
        assert torch.equal(mlla.out_proj.weight, proj)
        assert torch.equal(rala.qkvo.weight[:48].flatten(1), qkv)
        assert torch.equal(rala.proj.weight.flatten(1), proj)
        x = torch.zeros(1, 16, 16)
        gates = torch.nn.functional.silu(mlla.act_proj(x)), rala.qkvo.bias[48:]
        for gate in gates:
            torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=1e-3)


class TestPictures:
    def test_the_label_is_the_shape_of_the_largest(self):
        scenes, label = vit_data.sample_labelled(500, seed=0)
        there = scenes.radius.masked_fill(scenes.shape < 0, 0)
        largest = there.argmax(1, keepdim=True)
        assert torch.equal(scenes.shape.gather(1, largest)[:, 0], label)
        assert label.bincount(minlength=7).min() > 40

    def test_the_large_one_touches_nothing(self):
        scenes, _ = vit_data.sample_labelled(500, seed=0)
        apart = (scenes.centre[:, 1:] - scenes.centre[:, :1]).norm(dim=-1)
        room = apart - scenes.radius[:, 1:] - scenes.radius[:, :1]
        assert room[scenes.shape[:, 1:] >= 0].min() > 0

    def test_the_same_seed_draws_the_same(self):
        device = torch.device("cpu")
        pictures, labels = vit_data.draw.__wrapped__(6, 16, 1, 0.1, device)
        again, _ = vit_data.draw.__wrapped__(6, 16, 1, 0.1, device)
        other, _ = vit_data.draw.__wrapped__(6, 16, 2, 0.1, device)
        assert torch.equal(pictures, again)
        assert not torch.equal(pictures, other)
        assert pictures.shape == (6, 3, 16, 16)
        assert labels.shape == (6,)

    def test_processes_share_a_round(self):
        pictures = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 2, 2)
        seen = []
        for rank in range(2):
            torch.manual_seed(0)
            loader = vit_data.Drawn(
                pictures, torch.arange(12), 3, training=True, rank=rank, world=2
            )
            assert len(loader) == 2
            seen += [y for _, y in loader]
        assert sorted(torch.cat(seen).tolist()) == list(range(12))


class TestComparison:
    def test_all_trainings_and_their_curves(self, tmp_path, monkeypatch):
        # In this process: others would load everything again.
        monkeypatch.setattr(
            compare_vit,
            "run_all",
            lambda trainings, *_: [train_vit.main(words) for words in trainings],
        )
        words = f"--attentions softmax mlla --seeds 0 1 --finetune 1 --output {tmp_path}"
        results = compare_vit.main(f"{words} --epochs 1 {TINY}".split())
        assert results == json.loads((tmp_path / "results.json").read_text())
        for stage in ("scratch", "finetune"):
            runs, rows = results[stage]["runs"], results[stage]["summary"]
            assert [(r["attention"], r["seed"]) for r in runs] == [
                ("softmax", 0), ("mlla", 0), ("softmax", 1), ("mlla", 1)
            ]  # fmt: skip
            accuracies = [100 * r["accuracy"] for r in runs if r["attention"] == "mlla"]
            assert rows["mlla"]["mean"] == pytest.approx(sum(accuracies) / 2, abs=1e-3)
            assert rows["softmax"]["from_softmax"] == 0
        plot_vit.main([str(tmp_path / "results.json"), "--output", str(tmp_path / "curves.png")])
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.size[0] > 500

    def test_what_is_done_is_not_repeated_and_a_failure_ends_it(self, tmp_path):
        words = f"{TINY} --attention softmax --epochs 1 --output {tmp_path}"
        training, failing = f"{words}/one".split(), f"{words}/two --batch-size 64".split()
        with pytest.raises(SystemExit, match=r"two failed: .*fewer training pictures"):
            compare_vit.run_all([training, failing], ThreadPoolExecutor(1), "test")
        assert "100%" in (tmp_path / "one" / "log.txt").read_text()
        done = (tmp_path / "one" / "result.json").stat().st_mtime_ns
        compare_vit.run_all([training], ThreadPoolExecutor(1), "test")
        assert (tmp_path / "one" / "result.json").stat().st_mtime_ns == done

    def test_summary(self):
        runs = [
            {"attention": name, "accuracy": value}
            for name, value in (("softmax", 0.9), ("softmax", 0.92), ("rala", 0.93))
        ]
        rows = compare_vit.summary(runs)
        assert rows["softmax"] == {
            "mean": 91.0, "deviation": 1.414, "seeds": [90.0, 92.0], "from_softmax": 0.0
        }  # fmt: skip
        assert rows["rala"]["from_softmax"] == 2.0
        assert "| rala | 93.00 | 93.00 | +2.00 |" in compare_vit.table("scratch", rows)
