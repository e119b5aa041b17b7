"""examples/train_tiny_sd.py trains a pipeline that diffusers loads, and can be interrupted."""

import argparse
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_tiny_sd  # noqa: E402
from scenes import caption, sample_scenes  # noqa: E402
from tiny_sd_trainer import Trainer  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def own_signal_handler():
    """The trainer's handler ends with these tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def log_of(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Output and work of the whole script, in two calls: the autoencoder alone, then the rest."""
    folder = tmp_path_factory.mktemp("tiny_sd")
    output, work = folder / "sd", folder / "work"
    words = ["--smoke", "--device", "cpu", "--output", str(output), "--work", str(work)]
    train_tiny_sd.main([*words, "--only-vae"])
    assert not (output / "model_index.json").exists()
    train_tiny_sd.main(words)
    return output, work


class TestSmokeTraining:
    def test_stages_run_once(self, folders):
        output, work = folders
        steps = [(e["stage"], e["step"]) for e in log_of(output) if "step" in e]
        assert steps == [("vae", 2), ("vae", 4), ("unet", 2), ("unet", 4)]
        scales = {e["scaling_factor"] for e in log_of(output) if "scaling_factor" in e}
        assert len(scales) == 1  # both calls measured the same
        for name in ("vae", "unet"):
            assert torch.load(work / f"{name}.pt", weights_only=True)["step"] == 4
        assert {file.name for file in work.glob("*.png")} == {
            "vae.png",
            "samples_128.png",
            "samples_256.png",
        }

    def test_the_folder_is_a_pipeline(self, folders):
        pipeline = StableDiffusionPipeline.from_pretrained(folders[0]).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        pictures = [
            pipeline(
                "a red star at the top on a blue background",
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
            for _ in range(2)
        ]
        assert pictures[0].shape == (1, 3, 128, 128)
        assert pictures[0].isfinite().all() and pictures[0].std() > 0
        assert torch.equal(*pictures)

    def test_the_tokenizer_keeps_captions_whole(self, folders):
        tokenizer = StableDiffusionPipeline.from_pretrained(folders[0]).tokenizer
        rng = random.Random(1)
        texts = [caption(scene, rng) for scene in sample_scenes(500, seed=7).describe()]
        for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
            assert len(ids) <= tokenizer.model_max_length
            assert len(ids) == 2 + len(text.replace(",", " ,").split())  # a word, a token
            assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == text


class TestTrainer:
    """The loop, with a model that takes no time."""

    def trainer(self, tmp_path, **changes):
        settings = {"output": tmp_path, "work": tmp_path / "work", "limit_minutes": None}
        settings |= {"seed": 0, "warmup": 1, "log_every": 1} | changes
        return Trainer(argparse.Namespace(**settings), torch.device("cpu"))

    def fit(self, trainer, steps, minutes=None, each_step=lambda: None):
        """Returns whether the stage is done, and the model."""
        torch.manual_seed(0)
        model = nn.Linear(4, 1)

        def loss_of():
            each_step()
            return model(torch.randn(8, 4)).square().mean()

        done = trainer.fit("vae", model, loss_of, lr=0.01, steps=steps, minutes=minutes)
        return done, model

    def test_a_stage_ends_after_its_steps(self, tmp_path):
        trainer = self.trainer(tmp_path)
        done, model = self.fit(trainer, steps=5)
        assert done and trainer.steps_done("vae") == 5
        assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 3, 4, 5]
        # Called again, it does nothing and finds what it learned.
        done, again = self.fit(self.trainer(tmp_path), steps=5)
        assert done and torch.equal(again.weight, model.weight)
        assert len(log_of(tmp_path)) == 5

    def test_a_stage_ends_after_its_minutes(self, tmp_path):
        done, _ = self.fit(self.trainer(tmp_path), steps=10**9, minutes=0.1 / 60)
        assert done

    def test_sigterm_leaves_a_checkpoint_to_go_on_from(self, tmp_path):
        trainer, calls = self.trainer(tmp_path), []

        def each_step():
            calls.append(None)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        done, _ = self.fit(trainer, steps=6, each_step=each_step)
        assert not done
        assert trainer.steps_done("vae") == 3  # the step at hand was finished
        done, _ = self.fit(self.trainer(tmp_path), steps=6)
        assert done
        assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
        seconds = [entry["seconds"] for entry in log_of(tmp_path)]
        assert seconds == sorted(seconds)

    def test_a_limit_leaves_a_checkpoint_and_the_stage_unfinished(self, tmp_path):
        trainer = self.trainer(tmp_path, limit_minutes=0.1 / 60)
        done, _ = self.fit(trainer, steps=10**9)
        steps = trainer.steps_done("vae")
        assert not done and steps > 0
        done, _ = self.fit(self.trainer(tmp_path), steps=steps + 2)
        assert done
        assert [entry["step"] for entry in log_of(tmp_path)] == list(range(1, steps + 3))

    def test_resuming_restores_model_and_moments(self, tmp_path):
        trainer = self.trainer(tmp_path)
        _, model = self.fit(trainer, steps=3)
        optimizer = torch.optim.AdamW(nn.Linear(4, 1).parameters())
        restored = nn.Linear(4, 1)
        step, seconds = trainer._resume("vae", restored, optimizer, None)
        assert step == 3 and seconds > 0
        assert torch.equal(restored.weight, model.weight)
        assert [state["step"].item() for state in optimizer.state.values()] == [3, 3]
