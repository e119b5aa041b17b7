"""examples/evaluate.py scores both attentions on the same captions, and goes on where it was."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from PIL import Image

from fbila import LinFusion

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import evaluate  # noqa: E402
import scores  # noqa: E402
from scene_reader import Reading  # noqa: E402
from scenes import Object, Scene, render, sample_scenes  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder with LinFusion weights beside it. Not to be written to."""
    folder = tmp_path_factory.mktemp("sd")
    pipeline = tiny_models.sd_pipeline(folder)
    pipeline.save_pretrained(folder)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    linfusion.save_pretrained(folder / "linfusion")
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Counts the pictures that are generated, by attention and size; warm-ups are left out."""
    counts: dict[str, int] = {}
    save = evaluate.PictureStore.save

    def counted(store, indices, pictures, seconds):
        name = store.folder.name.rsplit("_", 1)[0]
        counts[name] = counts.get(name, 0) + len(indices)
        save(store, indices, pictures, seconds)

    monkeypatch.setattr(evaluate.PictureStore, "save", counted)
    return counts


def run(model, output, *more, pictures=4, batch_size=3):
    words = f"--model {model} --output {output} --pictures {pictures} --batch-size {batch_size} "
    words += f"--sizes 32 64 --steps 2 --device cpu {' '.join(map(str, more))}"
    evaluate.main(words.split())
    return json.loads((output / "evaluation.json").read_text())


def pictures_of(output, name, n):
    (folder,) = (output / "pictures").glob(f"{name}_*")
    parts = [torch.load(file, weights_only=True) for file in folder.glob("*.pt")]
    found = {i: p for part in parts for i, p in zip(part["indices"], part["pictures"], strict=True)}
    return torch.stack([found[i] for i in range(n)])


@pytest.fixture(scope="module")
def output(model, tmp_path_factory):
    """What the script wrote for both attentions. Not to be written to."""
    folder = tmp_path_factory.mktemp("evaluation")
    run(model, folder)
    return folder


class TestEvaluation:
    def test_report(self, output):
        report = json.loads((output / "evaluation.json").read_text())
        rows = [(row["attention"], row["size"]) for row in report["rows"]]
        assert rows == [(a, size) for a in ("softmax", "linfusion") for size in (32, 64)]
        for row in report["rows"]:
            assert len(row["right"]) == 4 and row["seconds"] > 0
            assert row["rates"]["all"] == sum(row["right"]) / 4
        settings = report["settings"]
        assert settings["pictures"] == 4 and settings["steps"] == 2
        assert {"scene_seed", "noise_seed", "model_sha256", "linfusion_sha256"} <= set(settings)
        assert settings["versions"]["torch"] == torch.__version__
        assert [pair["size"] for pair in report["pairs"]] == [32, 64]

    def test_sheets(self, output):
        for size in (32, 64):
            sheet = Image.open(output / f"sheet_{size}.png")
            assert sheet.width > 4 * 256 and sheet.height > 2 * 256

    def test_attentions_start_from_the_same_noise(self, output):
        softmax, linfusion = (pictures_of(output, f"{a}_64", 4) for a in evaluate.ATTENTIONS)
        assert not torch.equal(softmax, linfusion)
        distance = (softmax.int() - linfusion.int()).abs().float().mean((1, 2, 3))
        others = (softmax.int() - linfusion.roll(1, 0).int()).abs().float().mean((1, 2, 3))
        assert (distance < others).all()

    def test_the_softmax_rows_are_the_pipeline_alone(self, model, output, tmp_path):
        bare = tmp_path / "bare"
        shutil.copytree(model, bare, ignore=shutil.ignore_patterns("linfusion"))
        report = run(bare, tmp_path, "--attention softmax", batch_size=1)
        assert report["pairs"] == [] and len(report["rows"]) == 2
        for size in (32, 64):
            alone, beside = (pictures_of(o, f"softmax_{size}", 4) for o in (tmp_path, output))
            # One by one instead of in threes: at most the last bit of a byte.
            assert (alone.int() - beside.int()).abs().max() <= 1

    def test_goes_on_from_what_is_there(self, model, output, drawn, tmp_path):
        work = tmp_path / "work"
        shutil.copytree(output / "pictures", work)
        before = json.loads((output / "evaluation.json").read_text())
        assert run(model, tmp_path, f"--work {work}") == before
        assert drawn == {}
        # A stopped run lacks a batch, and left a part of a file.
        (lost,) = work.glob("linfusion_64_*/00003_1.pt")
        lost.rename(lost.with_suffix(".part"))
        after = run(model, tmp_path, f"--work {work}")
        assert drawn == {"linfusion_64": 1}
        assert [row["rates"] for row in after["rows"]] == [row["rates"] for row in before["rows"]]
        # More pictures are the same ones and some more, whatever the batch size.
        run(model, tmp_path, f"--work {work} --attention softmax", pictures=6, batch_size=5)
        assert drawn == {"linfusion_64": 1, "softmax_32": 2, "softmax_64": 2}

    @pytest.mark.parametrize("change", ["--steps 3", "--guidance 2", "--dtype bf16", "weights"])
    def test_other_settings_never_mix(self, model, output, drawn, tmp_path, change):
        work, other = tmp_path / "work", model
        shutil.copytree(output / "pictures", work)
        if change == "weights":
            other, change = tmp_path / "sd", ""
            shutil.copytree(model, other)
            pipeline = tiny_models.sd_pipeline(tmp_path)
            with torch.no_grad():
                next(pipeline.unet.parameters()).add_(0.01)
            pipeline.unet.save_pretrained(other / "unet")
        run(other, tmp_path, f"--work {work} --attention softmax", change, pictures=1)
        assert drawn == {"softmax_32": 1, "softmax_64": 1}


def test_a_picture_does_not_depend_on_how_many_there_are():
    few, many = evaluate.held_out_scenes(3), evaluate.held_out_scenes(1001)
    assert few[0] == many[0][:3] and few[1] == many[1][:3]
    assert len(many[1]) == 1001 and len(set(many[1])) > 980


def test_perfect_pictures_score_one_and_others_nought(monkeypatch, model, tmp_path, capsys):
    """What the reader finds right in rendered scenes arrives in the table, caption by caption."""
    scenes = sample_scenes(1000, evaluate.SCENE_SEED)[:4]

    def draw(pipeline, args, name, size, store):
        store.seconds.update(dict.fromkeys(range(4), 0.5))
        pictures = render(scenes, 128).mul(255).round().byte()
        return pictures if name.startswith("softmax") else pictures.roll(1, 0)

    monkeypatch.setattr(evaluate, "generate", draw)
    report = run(model, tmp_path)
    assert [row["rates"]["all"] for row in report["rows"]] == [1, 1, 0, 0]
    assert report["pairs"][0] == {
        "size": 32,
        "both": 0,
        "softmax_only": 4,
        "linfusion_only": 0,
        "neither": 0,
    }
    out = capsys.readouterr().out
    assert (
        "| attention | size | all right | colour | shape | place | ground | count | seconds |"
        in out
    )
    assert "| softmax | 32 |" + " 100.0% |" * 6 + " 2.0 |" in out


def test_the_strict_score_asks_for_the_whole_set():
    star, ring = ("red", "star", "at the top"), ("blue", "ring", "on the left")
    scene = Scene("white", frozenset({Object(*star), Object(*ring)}))
    swapped = (("blue", *star[1:]), ("red", *ring[1:]))
    readings = [
        Reading("white", (ring, star)),
        Reading("pink", (ring, star)),
        Reading("white", swapped),
        Reading("white", (ring,)),
        Reading("white", (ring, star, star)),
    ]
    result = scores.score(readings, [scene] * 5)
    assert result["right"] == [True, False, False, False, False]
    assert result["rates"]["all"] == 0.2
    assert result["rates"]["objects_exact"] == 0.4
    assert result["rates"]["colours"] == 0.6


def test_the_interval_is_wilsons():
    assert scores.wilson(90, 100) == (0.8256, 0.9448)
    assert scores.wilson(0, 10) == (0.0, 0.2775)
    assert scores.wilson(1000, 1000) == (0.9962, 1.0)


def test_reader_check(tmp_path, capsys):
    words = f"--reader-check --pictures 20 --sizes 128 256 --device cpu --output {tmp_path}"
    evaluate.main(words.split())
    rows = json.loads((tmp_path / "reader_check.json").read_text())["rows"]
    assert [row["size"] for row in rows] == [128] * 6 + [256] * 6
    for row in rows:
        chance = row["pictures"] == "of another caption"
        assert row["rates"]["all"] <= 0.05 if chance else row["rates"]["all"] >= 0.9
    assert "| clean | 128 | 100.0% |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model nowhere", "nowhere is no folder of a diffusers pipeline"),
        ("--model {model} --linfusion nowhere", "No LinFusion weights in nowhere"),
        (
            "--model {model} --linfusion {model}/unet",
            "This is no LinFusion: its configuration has no modules_list",
        ),
        ("--model {model} --device nonsense", "--device nonsense:"),
    ],
)
def test_bad_input_ends_in_one_line(model, tmp_path, words, message):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(f"{words.format(model=model)} --output {tmp_path}".split())
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


@pytest.mark.parametrize("words", ["--sizes 100", "--pictures 0", "--steps 0", "--dtype int8"])
def test_bad_options_are_named(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([*words.split(), "--output", str(tmp_path)])
    assert words.split()[0] in capsys.readouterr().err.splitlines()[-1]
