"""examples/distill.py trains LinFusion on the paper's loss, and can be interrupted."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

from fbila import LinFusion

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import distill  # noqa: E402
import distill_data  # noqa: E402
import distill_loss  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny_models.sd_pipeline(folder).save_pretrained(folder)
    return folder


def run(model, work, *more):
    distill.main(
        f"--model {model} --data scenes --work {work} --output {work}/weights --resolutions 32 64 "
        f"--resolution-weights 3 1 --batch-size 4 --log-every 1 --warmup 2 --lr 1e-3 "
        f"{' '.join(map(str, more))}".split()
    )
    return load_file(work / "weights" / WEIGHTS)


def log_of(work):
    return [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]


def loss_with(weights):
    """The loss on a fixed batch of noised nothing, with trained weights or those it starts from."""
    unet = tiny_models.small_unet(sample_size=8)
    linfusion = LinFusion.construct_for(
        unet=unet, load_pretrained=weights is not None, pretrained_model_name_or_path=weights
    )
    torch.manual_seed(0)
    noise = torch.randn(64, 4, 4, 4)
    text = torch.randn(64, 7, 32)
    step = torch.randint(1000, (64,))
    with torch.no_grad():
        losses = distill_loss.Distillation(unet, linfusion, compiled=False)(
            noise, step, noise, encoder_hidden_states=text
        )
    return losses["total"].item()


def test_the_loss_is_the_papers():
    unet = tiny_models.small_unet()
    linfusion = LinFusion.construct_for(unet=unet, load_pretrained=False)
    outputs = {"student": [], "teacher": []}
    inputs = tiny_models.unet_inputs(unet)
    predictions = {}
    for who in outputs:
        if who == "teacher":
            linfusion.unmount()
        hooks = [
            unet.get_submodule(m["module_name"]).register_forward_hook(
                lambda _, __, output, kept=outputs[who]: kept.append(output)
            )
            for m in linfusion.config["modules_list"]
        ]
        predictions[who] = tiny_models.predict(unet, **inputs)
        for hook in hooks:
            hook.remove()
    linfusion.mount_to(unet)
    target = torch.randn(2, 4, 16, 16)
    losses = distill_loss.Distillation(unet, linfusion, compiled=False)(
        inputs["sample"],
        inputs["timestep"],
        target,
        encoder_hidden_states=inputs["encoder_hidden_states"],
    )
    task = F.mse_loss(predictions["student"], target)
    prediction = F.mse_loss(predictions["student"], predictions["teacher"])
    pairs = zip(outputs["student"], outputs["teacher"], strict=True)
    attention = sum(F.mse_loss(s, t) for s, t in pairs) / 6
    expected = {
        "total": task + 0.5 * prediction + 0.5 * attention,
        "task": task,
        "prediction": prediction,
        "attention": attention,
    }
    assert prediction > 0 and attention > 0
    torch.testing.assert_close(losses, expected)
    losses["total"].backward()
    assert all(p.grad is not None for p in linfusion.parameters())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_targets(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    batch = {"latents": torch.randn(64, 4, 2, 2), "text": torch.ones(64, 3, 5)}
    blank = {"text": torch.zeros(1, 3, 5)}
    example = distill_loss.noised(batch, blank, scheduler, drop_captions=0.5)
    a = scheduler.alphas_cumprod[example["timestep"]].view(-1, 1, 1, 1)
    noise = (example["noisy"] - a.sqrt() * batch["latents"]) / (1 - a).sqrt()
    expected = {
        "epsilon": noise,
        "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * batch["latents"],
        "sample": batch["latents"],
    }
    torch.testing.assert_close(example["target"], expected[kind], rtol=1e-3, atol=1e-3)
    dropped = (example["encoder_hidden_states"] == 0).all((1, 2))
    kept = (example["encoder_hidden_states"] == 1).all((1, 2))
    assert (dropped | kept).all() and 10 < dropped.sum() < 54
    assert len(example["timestep"].unique()) > 32


def test_a_run_learns_and_saves(model, tmp_path):
    files = {f: f.read_bytes() for f in model.rglob("*") if f.is_file()}
    weights = run(model, tmp_path, "--steps 40 --pool 8 --ema 0.9 --half")
    assert {f: f.read_bytes() for f in model.rglob("*") if f.is_file()} == files
    entries = log_of(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, 41))
    for entry in entries:
        parts = entry["task"] + 0.5 * entry["prediction"] + 0.5 * entry["attention"]
        assert entry["total"] == pytest.approx(parts, rel=1e-3)
    assert entries[0]["lr"] < entries[1]["lr"] > entries[-1]["lr"]
    assert loss_with(tmp_path / "weights") < 0.99 * loss_with(None)
    assert {t.dtype for t in weights.values()} == {torch.float16}
    raw = load_file(tmp_path / "checkpoint" / "linfusion" / WEIGHTS)
    averaged = weights["0.to_q_.3.weight"].float()
    assert not torch.allclose(raw["0.to_q_.3.weight"], averaged, atol=1e-4)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(model, tmp_path, monkeypatch):
    whole = run(model, tmp_path / "whole", "--steps 6 --save-minutes 0 --accumulate 2")
    log = distill.log

    def interrupted(file, step, **entry):
        if step == 4:
            raise KeyboardInterrupt
        log(file, step=step, **entry)

    monkeypatch.setattr(distill, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts", "--steps 6 --save-minutes 0 --accumulate 2")
    monkeypatch.setattr(distill, "log", log)
    again = run(model, tmp_path / "parts", "--steps 6 --resume --accumulate 2")
    strip = [{k: v for k, v in e.items() if k != "seconds"} for e in log_of(tmp_path / "whole")]
    assert [
        {k: v for k, v in e.items() if k != "seconds"} for e in log_of(tmp_path / "parts")
    ] == strip
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name


def test_the_average_can_be_left_out_and_weights_taken_up(model, tmp_path):
    run(model, tmp_path / "a", "--steps 2 --ema 0 --gradient-checkpointing")
    raw = load_file(tmp_path / "a" / "checkpoint" / "linfusion" / WEIGHTS)
    weights = load_file(tmp_path / "a" / "weights" / WEIGHTS)
    assert all(torch.equal(weights[name], raw[name]) for name in raw)
    further = run(model, tmp_path / "b", f"--steps 1 --lr 0 --start-from {tmp_path}/a/weights")
    assert all(torch.equal(further[name], raw[name]) for name in raw)


def test_minutes_end_a_run(model, tmp_path):
    run(model, tmp_path, "--steps 100000 --minutes 0.01")
    assert 0 < log_of(tmp_path)[-1]["step"] < 1000


def test_stable_diffusion_xl(tmp_path):
    folder = tmp_path / "sdxl"
    tiny_models.sdxl_pipeline(folder).save_pretrained(folder)
    weights = run(folder, tmp_path, "--steps 2 --mid-dim-scale 16 --drop-captions 0.5")
    assert weights["0.to_q_.0.weight"].shape == (4, 64)
    assert len({name.split(".")[0] for name in weights}) == 28


def test_a_folder_of_pictures(model, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    # Wider than high: what is in the middle must stay.
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    wide.save(pictures / "a.png")
    (pictures / "a.txt").write_text("a blue square\n")
    Image.new("RGB", (40, 40), "white").save(pictures / "no_caption.png")
    source = distill_data.FolderSource(pictures)
    images, captions = source(3, 16, seed=0)
    assert captions == ["a blue square"] * 3
    assert images.shape == (3, 3, 16, 16)
    torch.testing.assert_close(images[0, :, 8, 8], torch.tensor([0.0, 0.0, 1.0]))

    rows = [
        {"file_name": "no_caption.png", "text": "white"},
        {"file_name": "a.png", "text": "blue"},
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = distill_data.FolderSource(pictures)
    images, captions = source(8, 16, seed=1)
    assert set(captions) == {"white", "blue"}
    assert source(8, 16, seed=1)[1] == captions
    for image, text in zip(images, captions, strict=True):
        assert image[2].mean() > 0.95 and (image[0].mean() > 0.95) == (text == "white")

    run(model, tmp_path, f"--data {pictures} --steps 2")
    shutil.rmtree(pictures)
    pictures.mkdir()
    with pytest.raises(SystemExit, match="holds no pictures with captions"):
        distill_data.FolderSource(pictures)


def test_sizes():
    sizes = distill_data.Sizes([128, 256], [3, 1], batch=16, seed=0)
    drawn = [sizes.at(step) for step in range(1000)]
    assert drawn == [sizes.at(step) for step in range(1000)]
    assert 200 < drawn.count(256) < 300
    assert (sizes.batch(128), sizes.batch(256)) == (16, 4)


def test_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        distill.main(["--model", str(tmp_path)])
    assert ended.value.code == 2
    assert "needs --data: a folder of pictures with captions" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no file named model_index"):
        distill.main(["--model", str(tmp_path), "--data", "scenes", "--work", str(tmp_path / "w")])
    folder = tmp_path / "inpainting"
    tiny_models.sd_pipeline(folder, in_channels=9).save_pretrained(folder)
    with pytest.raises(SystemExit, match="takes more than noise and text; distil its base model"):
        distill.main(["--model", str(folder), "--data", "scenes", "--work", str(tmp_path / "w")])
