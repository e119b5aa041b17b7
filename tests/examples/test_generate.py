"""examples/generate.py draws what it is asked for, measures it, and ends errors in one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fbila import LinFusion

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import generate  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder with LinFusion weights beside it, which differ from the UNet's."""
    folder = tmp_path_factory.mktemp("sd")
    pipeline = tiny_models.sd_pipeline(folder)
    pipeline.save_pretrained(folder)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    linfusion.save_pretrained(folder / "linfusion")
    return folder


def run(model, output, *more):
    words = f"--model {model} --output {output} --height 64 --width 96 --steps 3 {' '.join(more)}"
    generate.main([*words.split(), "--prompt", "a red ring", "--prompt", "a blue star"])
    return {file.stem: np.asarray(Image.open(file)) for file in sorted(output.glob("*.png"))}


def test_side_by_side(model, tmp_path, capsys):
    pictures = run(model, tmp_path, "--compare", "--device cpu")
    assert list(pictures) == ["grid", "linear_0", "linear_1", "softmax_0", "softmax_1"]
    assert pictures["linear_0"].shape == (64, 96, 3)
    assert pictures["grid"].shape[0] > 2 * 64 and pictures["grid"].shape[1] > 2 * 96
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": 5.0}
    for name in ("softmax", "linear"):
        if name == "linear":
            LinFusion.construct_for(pipeline)
        for seed, prompt in enumerate(("a red ring", "a blue star")):
            generator = torch.Generator().manual_seed(seed)
            image = pipeline(prompt, generator=generator, **settings).images[0]
            difference = np.abs(np.asarray(image, int) - pictures[f"{name}_{seed}"])
            assert difference.max() <= 1  # one by one or in a batch: the last bit of a byte
    assert np.abs(pictures["linear_0"].astype(int) - pictures["softmax_0"]).max() > 1
    out = capsys.readouterr().out
    assert "2 pictures of 96 x 64, 3 steps, seed 0, on cpu in float32" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "MiB" in line}
    assert list(rows) == ["softmax", "linear"]
    for name, row in rows.items():
        assert float(row[1]) > 0 and float(row[2]) >= 0
        assert row[4] == str(tmp_path / f"{name}_*.png")
    assert str(tmp_path / "grid.png") in out


def test_one_way_only(model, tmp_path):
    linear = run(model, tmp_path / "linear", "--seed 7")
    assert list(linear) == ["grid", "linear_0", "linear_1"]
    softmax = run(model, tmp_path / "softmax", "--linfusion none --seed 8")
    assert list(softmax) == ["grid", "softmax_0", "softmax_1"]
    again = run(model, tmp_path / "again", f"--linfusion {model}/linfusion --seed 8")
    close = np.abs(again["linear_0"].astype(int) - linear["linear_1"]).mean()
    other = np.abs(again["linear_0"].astype(int) - linear["linear_0"]).mean()
    assert close > 1 and other > 1  # another prompt, another seed


def test_dtype(model, tmp_path, capsys):
    run(model, tmp_path, "--dtype bfloat16")
    assert "in bfloat16" in capsys.readouterr().out


def test_defaults():
    args = generate.parse([])
    assert args.compare and args.prompt == generate.TINY_PROMPTS
    assert not generate.parse(["--no-compare"]).compare
    assert not generate.parse(["--linfusion", "none"]).compare
    other = generate.parse(["--model", "someone/something"])
    assert not other.compare and other.prompt == generate.PROMPTS
    assert generate.parse(["--model", "someone/something", "--compare"]).compare


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--height 60", "--height and --width must be multiples of 8, got 60 and 64"),
        ("--width -8", "--height and --width must be multiples of 8, got 64 and -8"),
        ("--device nothing", "--device nothing: "),
        ("--linfusion {model}/unet", "This is no LinFusion: its configuration has no"),
        ("--linfusion {model}/vae/nothing", "is neither a folder nor a model on the Hub"),
    ],
)
def test_errors(model, arguments, words):
    with pytest.raises(SystemExit) as ended:
        generate.main(f"--model {model} {arguments.format(model=model)}".split())
    assert words in str(ended.value) and "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--compare --linfusion none", "--compare needs LinFusion"),
        ("--steps 1", "--steps must be at least 2"),
    ],
)
def test_impossible_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        generate.parse(arguments.split())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_weights_for_another_model_and_none_at_all(model, tmp_path):
    pipeline = tiny_models.sd_pipeline(tmp_path, block_out_channels=(64, 64))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="No LinFusion weights are known for this UNet"):
        generate.main(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="This LinFusion checkpoint is for 6 modules"):
        generate.main(["--model", str(tmp_path), "--linfusion", str(model / "linfusion")])


def test_a_model_that_cannot_be_fetched():
    command = [sys.executable, EXAMPLES / "generate.py", "--model", "fbila-tests/no-such-model"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    *_, last = ended.stderr.splitlines()  # other libraries may warn of their own versions
    assert "fbila-tests/no-such-model" in last and "Traceback" not in ended.stderr


@pytest.mark.parametrize("script", ["generate", "high_resolution", "distill"])
def test_a_missing_extra(script):
    code = (
        "import sys, runpy; sys.modules['diffusers'] = None; "
        f"sys.path.insert(0, {str(EXAMPLES)!r}); "
        f"runpy.run_path({str(EXAMPLES / f'{script}.py')!r}, run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "diffusers" in ended.stderr and "pip install fbila[demo]" in ended.stderr


def test_peak_memory_on_a_cpu():
    peak = generate.PeakMemory(torch.device("cpu"))
    for _ in range(2):  # the second block must not profit from what the first left behind
        with peak.watch():
            held = torch.ones(64 * 2**20 // 4) + 1
            del held
        assert 64 * 2**20 <= peak.bytes < 192 * 2**20


def test_captions_are_wrapped():
    font = generate.ImageFont.load_default(14)
    lines = generate.wrap("a red ring in the center of a green background", font, 100)
    assert " ".join(lines) == "a red ring in the center of a green background"
    assert len(lines) > 1 and all(font.getlength(line) <= 100 for line in lines)
