"""Captions say what is drawn, and the reader finds it, or says that something else is there."""

import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import reader_check  # noqa: E402
from scene_reader import compare, rates, read  # noqa: E402
from scenes import (  # noqa: E402
    COLOURS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    Object,
    Scene,
    Scenes,
    caption,
    render,
    sample_scenes,
)

CIRCLE = ("red", "circle", "in the top left")
STAR = ("blue", "star", "in the bottom right")


def scene_of(ground, *objects) -> Scene:
    return Scene(ground, frozenset(Object(*o) for o in objects))


def draw(ground, *objects, size=128):
    """A picture `(1, 3, size, size)` of objects `(colour, shape, place)`, upright."""
    colours, places = list(COLOURS), list(PLACES)
    free = [(colours[0], None, place) for place in places if place not in {o[2] for o in objects}]
    slots = [*objects, *free][: max(MAX_OBJECTS, len(objects))]
    scenes = Scenes(
        ground=torch.tensor([colours.index(ground)]),
        colour=torch.tensor([[colours.index(c) for c, _, _ in slots]]),
        shape=torch.tensor([[SHAPES.index(s) if s else -1 for _, s, _ in slots]]),
        place=torch.tensor([[places.index(p) for _, _, p in slots]]),
        centre=torch.tensor([[PLACES[p] for _, _, p in slots]]),
        radius=torch.full((1, len(slots)), 0.13),
        angle=torch.zeros(1, len(slots)),
    )
    assert scenes.describe() == [scene_of(ground, *objects)]
    return render(scenes, size)


def heard(text: str) -> Scene:
    """The scene that a caption describes."""
    colours, shapes, places = ("|".join(names) for names in (COLOURS, SHAPES, PLACES))
    objects = re.findall(rf"an? ({colours}) ({shapes}) ({places})", text)
    (ground,) = re.findall(rf"an? ({colours}) background", text)
    return scene_of(ground, *objects)


def same_scenes(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


class TestScenes:
    def test_a_seed_gives_the_same_scenes_and_another_gives_others(self):
        assert same_scenes(sample_scenes(50, seed=5), sample_scenes(50, seed=5))
        assert not same_scenes(sample_scenes(50, seed=5), sample_scenes(50, seed=6))

    def test_scenes_are_what_they_promise(self):
        scenes = sample_scenes(2000, seed=0).describe()
        assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
        for scene in scenes:
            assert len({o.place for o in scene.objects}) == len(scene.objects)
            assert scene.ground not in {o.colour for o in scene.objects}
        for index, names in enumerate((COLOURS, SHAPES, PLACES)):
            seen = Counter(o[index] for scene in scenes for o in scene.objects)
            assert set(seen) == set(names)
            assert max(seen.values()) < 1.3 * min(seen.values())


class TestCaptions:
    def test_captions_say_what_is_in_the_scene(self):
        rng = random.Random(0)
        for scene in sample_scenes(500, seed=1).describe():
            text = caption(scene, rng)
            assert heard(text) == scene
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)

    def test_captions_differ_in_order_and_phrasing_and_repeat_with_their_seed(self):
        scene = scene_of("green", CIRCLE, STAR, ("pink", "ring", "at the top"))
        texts = [caption(scene, random.Random(seed)) for seed in range(300)]
        assert len(set(texts)) == 6 * 3
        assert texts == [caption(scene, random.Random(seed)) for seed in range(300)]


class TestRender:
    def test_a_seed_gives_the_same_pictures(self):
        scenes = sample_scenes(8, seed=2)
        assert torch.equal(render(scenes, 64), render(sample_scenes(8, seed=2), 64))
        # A picture does not depend on the others that are drawn with it.
        torch.testing.assert_close(render(scenes[3:5], 64), render(scenes, 64)[3:5])

    def test_a_larger_picture_is_the_same_picture(self):
        scenes = sample_scenes(40, seed=3)
        small, large = render(scenes, 128), render(scenes, 256)
        assert small.shape == (40, 3, 128, 128) and large.shape == (40, 3, 256, 256)
        assert large.min() >= 0 and large.max() <= 1
        difference = (F.avg_pool2d(large, 2) - small).abs()
        assert difference.mean() < 5e-4
        assert difference.amax() < 0.12  # at edges, where each size antialiases over its own pixel


class TestReader:
    @pytest.mark.parametrize("size", [128, 256])
    def test_reads_rendered_pictures(self, size):
        scenes = sample_scenes(200, seed=1000 + size)
        right = rates(read(render(scenes, size)), scenes.describe())
        assert right["all"] >= 0.98, right

    def test_reads_blurred_and_noisy_pictures(self):
        scenes = sample_scenes(50, seed=4)
        kinds = reader_check.variants(render(scenes, 128), seed=0)
        harder = kinds["blurred, noisy, 8-bit"]
        assert (harder - kinds["clean"]).abs().mean() > 0.02
        assert rates(read(harder), scenes.describe())["all"] >= 0.94

    @pytest.mark.parametrize(
        ("picture", "wrong"),
        [
            pytest.param(("green", ("pink", *CIRCLE[1:]), STAR), {"colours"}, id="colour"),
            pytest.param(
                ("green", ("blue", *CIRCLE[1:]), ("red", *STAR[1:])), set(), id="colours_swapped"
            ),
            pytest.param(
                ("green", ("red", "square", CIRCLE[2]), STAR), {"shapes"}, id="circle_as_square"
            ),
            pytest.param(
                ("green", ("red", "ring", CIRCLE[2]), STAR), {"shapes"}, id="circle_as_ring"
            ),
            pytest.param(("green", (*CIRCLE[:2], "at the top"), STAR), {"places"}, id="next_place"),
            pytest.param(
                ("green", (*CIRCLE[:2], STAR[2]), (*STAR[:2], CIRCLE[2])),
                set(),
                id="places_swapped",
            ),
            pytest.param(("yellow", CIRCLE, STAR), {"ground"}, id="ground"),
            pytest.param(
                ("green", CIRCLE, STAR, ("white", "heart", "in the center")),
                {"count", "colours", "shapes", "places"},
                id="an_object_more",
            ),
            pytest.param(
                ("green", CIRCLE, STAR, ("red", "circle", "on the left")),
                {"count", "colours", "shapes", "places"},
                id="an_object_twice",
            ),
            pytest.param(
                ("green", CIRCLE), {"count", "colours", "shapes", "places"}, id="an_object_less"
            ),
        ],
    )
    def test_finds_the_difference(self, picture, wrong):
        asked = scene_of("green", CIRCLE, STAR)
        (reading,) = read(draw(*picture))
        assert all(compare(reading, scene_of(*picture)).values())
        assert {name for name, right in compare(reading, asked).items() if not right} == {
            "all",
            *wrong,
        }

    def test_refuses_half_an_object(self):
        picture = draw("green", CIRCLE, STAR)
        picture[..., 64:, 64:106] = draw("green")[..., 64:, 64:106]
        (reading,) = read(picture)
        assert not compare(reading, scene_of("green", CIRCLE, STAR))["all"]

    def test_refuses_a_stray_blob(self):
        picture = draw("green", CIRCLE, STAR)
        picture[..., 60:66, 60:66] = torch.tensor(COLOURS["white"])[:, None, None]
        (reading,) = read(picture)
        found = compare(reading, scene_of("green", CIRCLE, STAR))
        assert not found["all"] and not found["count"]

    def test_refuses_a_colour_between_two(self):
        picture = draw("green", CIRCLE)
        between = (draw("green", ("purple", *CIRCLE[1:])) + picture) / 2
        ((found, shape, place),) = read(between)[0].objects
        assert (found, shape, place) == (None, *CIRCLE[1:])

    def test_finds_nothing_on_an_empty_ground(self):
        (reading,) = read(draw("green"))
        assert reading == ("green", ())
        assert not compare(reading, scene_of("green", CIRCLE))["all"]

    @pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
    def test_accepts_no_blank_picture(self, level):
        (reading,) = read(torch.full((1, 3, 128, 128), level))
        assert reading.ground in (None, "white")
        assert all(None in found for found in reading.objects)

    def test_accepts_no_noise(self):
        noise = torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(noise[..., :16, :16], 128, mode="bicubic").clamp(0, 1)
        scenes = sample_scenes(16, seed=6).describe()
        right = rates(read(torch.cat([noise, smooth])), scenes)
        assert right["all"] == right["objects"] == 0
