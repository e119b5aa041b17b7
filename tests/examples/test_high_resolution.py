"""examples/high_resolution.py: the size asked for, resumed bit for bit, nothing overwritten."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file

from fbila import LinFusion

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import high_resolution  # noqa: E402
import stage_folder  # noqa: E402
from high_resolution import TINY, plan  # noqa: E402
from models import load_linfusion, load_pipeline  # noqa: E402
from scene_reader import read  # noqa: E402

SHIPPED = EXAMPLES / "high_resolution.png"
# What a run of two stages and two steps, the second stage with one, writes one after the other.
WRITES = [
    "run.json",
    "stage_1_steps/0001.safetensors",
    "stage_1_steps/0002.safetensors",
    "stage_1.png",
    "run.json",
    "stage_2_steps/0001.safetensors",
    "stage_2.png",
    "run.json",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline folder for 64 pixels with LinFusion weights beside it. Not to be written to."""
    folder = tmp_path_factory.mktemp("sd")
    pipeline = tiny_models.sd_pipeline(folder)
    pipeline.save_pretrained(folder)
    linfusion = LinFusion.construct_for(pipeline, load_pretrained=False)
    linfusion.save_pretrained(folder / "linfusion")
    return folder


def draw(model, output, *more, size="128x96"):
    """Runs the example and returns its pictures by name; `more` takes precedence."""
    words = f"--model {model} --output {output} --size {size} --steps 2 --strength 0.5 --tile 64 "
    high_resolution.main(["a red ring", *words.split(), "--device", "cpu", *more])
    return {file.stem: np.asarray(Image.open(file)) for file in sorted(output.glob("*.png"))}


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """The pictures of a run that nothing interrupts."""
    folder, written = tmp_path_factory.mktemp("uninterrupted"), []
    write = stage_folder.write

    def listed_write(path, save_to):
        written.append(path.relative_to(folder).as_posix())
        write(path, save_to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_folder, "write", listed_write)
        pictures = draw(model, folder)
    assert written == WRITES
    return pictures


@pytest.fixture
def computed(monkeypatch):
    """The steps for which the UNet has been asked, rather than the folder."""
    steps = []
    save = stage_folder.save
    monkeypatch.setattr(stage_folder, "save", lambda data: steps.append(data) or save(data))
    return steps


@pytest.mark.parametrize(
    ("width", "height", "native", "stages"),
    [
        (1024, 1024, 128, [(128, 128), (256, 256), (512, 512), (1024, 1024)]),
        (8192, 4096, 1024, [(1448, 728), (2896, 1456), (5792, 2912), (8192, 4096)]),
        (768, 768, 512, [(512, 512), (768, 768)]),
        (1048, 1048, 512, [(512, 512), (1048, 1048)]),  # hardly more than double: no stage between
        (512, 512, 512, [(512, 512)]),
        (64, 48, 128, [(64, 48)]),
    ],
)
def test_stages_double_up_to_the_size_asked_for(width, height, native, stages):
    planned = plan(width, height, native, [0.5])
    assert [stage[1:3] for stage in planned] == stages
    assert [stage.number for stage in planned] == list(range(1, len(stages) + 1))


def test_the_last_strength_repeats():
    assert [s.strength for s in plan(64, 64, 8, [0.3, 0.2])] == [None, 0.3, 0.2, 0.2]
    assert [s.strength for s in plan(16, 16, 8, [0.3, 0.2])] == [None, 0.3]


def test_every_stage_has_its_size(model, tmp_path, uninterrupted, capsys):
    sizes = {name: picture.shape for name, picture in uninterrupted.items()}
    assert sizes == {"stage_1": (56, 72, 3), "stage_2": (96, 128, 3)}
    square = draw(model, tmp_path, size="200")
    assert [len(picture) for picture in square.values()] == [64, 128, 200]
    out, err = capsys.readouterr()
    assert [line.split()[:3] for line in out.splitlines()] == [
        ["64", "x", "64"],
        ["128", "x", "128"],
        ["200", "x", "200"],
    ]
    assert "3/3" in err and "200 x 200" in err  # progress, of the stages and of a stage's steps


def test_the_first_stage_is_the_pipelines_own_picture(model, tmp_path):
    pipeline = load_pipeline(str(model))
    load_linfusion(pipeline)
    settings = {"width": 64, "height": 56, "num_inference_steps": 2, "guidance_scale": 5.0}
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        own = np.asarray(pipeline("a red ring", generator=generator, **settings).images[0], int)
        drawn = draw(model, tmp_path / str(seed), "--seed", str(seed), size="64x56")
        assert np.abs(own - drawn["stage_1"]).max() <= 1  # the last bit of a byte


@pytest.mark.parametrize("unwritten", range(len(WRITES)))
def test_an_interrupted_run_goes_on_bit_for_bit(
    model, tmp_path, uninterrupted, computed, monkeypatch, unwritten
):
    """Interrupted in the middle of each file that it writes: within steps and between stages."""
    flush, flushed = os.fsync, []

    def interrupted_flush(descriptor):
        flushed.append(descriptor)
        if len(flushed) == unwritten + 1:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            raise KeyboardInterrupt
        flush(descriptor)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupted_flush)
        draw(model, tmp_path)
    for file in tmp_path.rglob("*.*"):  # all are whole, but for those with another name
        if file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix != ".unfinished":
            json.loads(file.read_text())

    computed.clear()
    resumed = draw(model, tmp_path)
    assert len(computed) == sum(name.endswith("safetensors") for name in WRITES[unwritten:])
    assert resumed.keys() == uninterrupted.keys()
    for name, picture in resumed.items():
        assert np.array_equal(picture, uninterrupted[name]), name
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".unfinished") == [
        "run.json",
        "stage_1.png",
        "stage_2.png",
    ]


def test_a_finished_run_is_not_repeated(model, tmp_path, computed, capsys):
    draw(model, tmp_path)
    before = contents(tmp_path)
    computed.clear()
    capsys.readouterr()
    draw(model, tmp_path, "--low-memory")  # no other picture, so the same run
    assert not computed and contents(tmp_path) == before
    assert capsys.readouterr().out == f"It is drawn already: {tmp_path / 'stage_2.png'}\n"


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("--seed=1", "seed"),
        ("--strength=0.6", "strength"),
        ("--size=136x96", "size"),
        ("--detail-prompt=a blue ring", "detail_prompt"),
        ("--model={tiny}", "detail_prompt, model, strength"),
    ],
)
def test_the_folder_of_another_run_is_refused(model, tmp_path, argument, name):
    folder = stage_folder.StageFolder(tmp_path, {})
    words = f"ring --model {model} --output {tmp_path}".split()
    folder.arguments = high_resolution.what_pictures_depend_on(high_resolution.parse(words))
    folder.begin(2)
    Image.new("RGB", (8, 8)).save(folder.picture_file(1))
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as ended:
        high_resolution.main([*words, argument.format(tiny=TINY)])
    words = f"{tmp_path} holds a run with another {name}. Give another --output, or delete the"
    assert str(ended.value).startswith(words) and "\n" not in str(ended.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("notes.txt", "mine", "{folder} holds something else. Give another --output."),
        ("run.json", "mine", "run.json is not the state of a run. Give another --output."),
        ("run.json", "[]", "run.json is not the state of a run. Give another --output."),
    ],
)
def test_a_folder_of_anything_else_is_refused(model, tmp_path, file, text, words):
    (tmp_path / file).write_text(text)
    with pytest.raises(SystemExit) as ended:
        draw(model, tmp_path)
    assert str(ended.value).endswith(words.format(folder=tmp_path))
    assert contents(tmp_path) == {tmp_path / file: text.encode()}
    with pytest.raises(SystemExit, match="holds something else"):
        draw(model, tmp_path / file)  # a file


def test_a_missing_picture_is_said(model, tmp_path):
    draw(model, tmp_path, size="64")
    (tmp_path / "stage_1.png").unlink()
    with pytest.raises(SystemExit, match=r"stage_1\.png is missing or damaged\. Delete "):
        draw(model, tmp_path, size="64")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--size 1020", "must be multiples of 8, got 1020"),
        ("--size 1024x1020", "must be multiples of 8, got 1024x1020"),
        ("--size=-8", "must be multiples of 8, got -8"),
        ("--size large", "'large' is neither 1024 nor 1536x1024"),
        ("--size 8x8x8", "'8x8x8' is neither 1024 nor 1536x1024"),
        ("--strength 0", "must be above 0 and at most 1, got 0"),
        ("--strength 0.3 1.1", "must be above 0 and at most 1, got 1.1"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--tile 100", "--tile must be a multiple of 64, got 100"),
        ("--tile 0", "--tile must be a multiple of 64, got 0"),
    ],
)
def test_impossible_arguments(tmp_path, arguments, words, capsys):
    output = tmp_path / "new"
    with pytest.raises(SystemExit) as ended:
        high_resolution.main(["ring", "--output", str(output), *arguments.split()])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists()


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match="--device nothing: ") as ended:
        high_resolution.main(["ring", "--output", str(tmp_path / "new"), "--device", "nothing"])
    assert "\n" not in str(ended.value) and not (tmp_path / "new").exists()


def test_defaults():
    tiny = high_resolution.parse(["ring", "--device", "cpu"])
    assert (tiny.size, tiny.dtype, tiny.detail_prompt) == ((1024, 1024), "float32", "")
    assert tiny.strength == list(high_resolution.TINY_STRENGTHS)
    other = high_resolution.parse(["ring", "--model", "someone/something"])
    assert other.strength == list(high_resolution.STRENGTHS) and other.detail_prompt == "ring"


def test_strength_says_how_many_steps(model, tmp_path, computed):
    for strength, steps in (("0.75", 3), ("0.01", 1)):
        computed.clear()
        draw(model, tmp_path / strength, "--steps", "4", "--strength", strength)
        assert len(computed) == 4 + steps


def test_later_stages_have_the_prompt_of_the_details(model, tmp_path, computed):
    """Without one they have no guidance either, and the UNet one sample instead of two."""
    given = {}
    for detail in ("a red ring", "a blue star", ""):
        computed.clear()
        folder = tmp_path / str(len(given))
        given[detail] = draw(model, folder, "--detail-prompt", detail, size="160")
        guided = [len(step["answer"]) for step in computed]
        assert guided == [2, 2, 2, 2 if detail else 1]
    for name in ("stage_1", "stage_2", "stage_3"):
        same = np.array_equal(given["a red ring"][name], given["a blue star"][name])
        assert same == (name != "stage_3")


def test_low_memory(model, tmp_path, uninterrupted, monkeypatch):
    modes = []
    real = high_resolution.low_memory
    monkeypatch.setattr(
        high_resolution, "low_memory", lambda pipeline: modes.append(real(pipeline)) or modes[-1]
    )
    pictures = draw(model, tmp_path, "--low-memory")
    assert len(modes) == 1
    for name, picture in pictures.items():
        assert np.abs(picture.astype(int) - uninterrupted[name]).max() <= 4, name  # of 255


def test_the_small_model_keeps_its_scene(tmp_path):
    prompt = "a yellow star at the top and a red heart at the bottom on a blue background"
    words = f"--size 256 --steps 10 --device cpu --output {tmp_path}"
    high_resolution.main([prompt, *words.split()])
    for file in (tmp_path / "stage_1.png", tmp_path / "stage_2.png", SHIPPED):
        picture = torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1) / 255
        (reading,) = read(picture[None])
        assert reading.ground == "blue", file
        assert sorted(reading.objects) == [
            ("red", "heart", "at the bottom"),
            ("yellow", "star", "at the top"),
        ]
    assert picture.shape == (3, 1024, 1024)
