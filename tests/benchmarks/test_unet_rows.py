"""The registry of whole UNets: the published models, and the goals that were set for them."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.unet.attentions import WAYS
from benchmarks.unet.goals import GIB, Goal
from benchmarks.unet.models import UNETS, make_inputs
from benchmarks.unet.rows import MODES, ROWS, TINY_ROWS, select

EACH = pytest.mark.parametrize("row", (*ROWS, *TINY_ROWS), ids=lambda row: row.name)

# By row: how many times as long as the reference each attention may take.
GOALS = {
    "eager/sd15/512": ("fbila fused blocks", "sdpa", 1.10),
    "eager/sd15/1024": ("fbila fused blocks", "sdpa", 0.85),
    "eager/sd15/2048": ("fbila fused blocks", "official", 0.90),
    "eager/sd15/4096": ("fbila fused blocks", "official", 0.90),
    "eager/sdxl/1024": ("fbila fused blocks", "sdpa", 1.10),
    "eager/sdxl/2048": ("fbila fused blocks", "official", 0.82),
    "eager/sdxl/4096": ("fbila fused blocks", "official", 0.82),
    "compiled/sd15/512": ("fbila fused", "sdpa", 1.0),
    "compiled/sd15/1024": ("fbila fused", "official", 0.85),
    "compiled/sd15/2048": ("fbila fused blocks", "official", 0.85),
    "compiled/sd15/4096": ("fbila fused blocks", "official", 0.85),
    "16k/eager/sd15/8192": ("fbila fused blocks", "official", 0.65),
    "16k/eager/sd15/16384": ("fbila fused blocks", "official", 0.65),
    "train/sd15/512": ("fbila fused blocks", "official", 0.85),
    "train/graph/sd15/512": ("fbila fused blocks", "official", 0.85),
}


@pytest.mark.parametrize(("name", "millions"), [("sd15", 859.5), ("sdxl", 2567.5)])
def test_number_of_parameters(name, millions):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name].config)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6, 1) == millions


def test_first_goal_of_each_row():
    found = {row.name: row.goals[0] for row in ROWS if row.goals}
    assert found == {name: Goal(*goal) for name, goal in GOALS.items()}


def test_further_goals():
    further = {row.name: row.goals[1:] for row in ROWS if row.goals[1:]}
    low = "fbila low memory"
    assert further == {
        "16k/eager/sd15/16384": (
            Goal(low, None, plus=24 * GIB, quantity="peak_bytes"),
            Goal(low, "fbila", 1.4),
        ),
        "train/sd15/512": (Goal("fbila fused blocks", "official", 0.90, quantity="peak_bytes"),),
    }


def test_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


@EACH
def test_fields_are_known(row):
    assert row.unet in UNETS
    assert row.mode in MODES
    assert set(row.attentions) <= set(WAYS)
    assert set(row.skipped) <= set(WAYS) - set(row.attentions)
    assert row.px % 64 == 0


@EACH
def test_goals_refer_to_what_is_measured(row):
    for goal in row.goals:
        assert {goal.attention, goal.reference} <= {None, *row.attentions}


def test_batches_and_modes():
    for row in ROWS:
        assert row.batch == {"16k": 1, "train": 4}.get(row.name.split("/")[0], 2)
        assert (row.mode != "eager") == (not row.name.startswith(("eager", "16k/eager")))


def test_select():
    assert select(ROWS) == list(ROWS)
    names = [row.name for row in select(ROWS, ["train", "eager/sdxl"])]
    assert names == [
        *(f"eager/sdxl/{px}" for px in (1024, 2048, 4096)),
        "train/sd15/512",
        "train/graph/sd15/512",
    ]
    assert select(ROWS, ["nothing"]) == []


def test_inputs_of_sdxl():
    inputs = make_inputs("sdxl", 1024, 2, "cpu", torch.float16)
    assert inputs["sample"].shape == (2, 4, 128, 128)
    assert inputs["encoder_hidden_states"].shape == (2, 77, 2048)
    added = inputs["added_cond_kwargs"]
    assert (added["text_embeds"].shape, added["time_ids"].shape) == ((2, 1280), (2, 6))


def test_verdict():
    goal = Goal("fbila", "official", 0.9)
    verdict = goal.verdict({"official": {"ms": 10.0}, "fbila": {"ms": 9.9}})
    assert (verdict["limit"], verdict["value"]) == (9.0, 9.9)
    assert verdict["over"] == pytest.approx(0.1)
    assert verdict["goal"] == "time of fbila at most 0.90 of official's"


@pytest.mark.parametrize(
    "outcomes",
    [{"fbila": {"ms": 1.0}, "official": {"out_of_memory": ""}}, {"official": {"ms": 1.0}}],
)
def test_verdict_without_a_time(outcomes):
    assert Goal("fbila", "official", 0.9).verdict(outcomes)["over"] is None


def test_verdict_of_an_amount():
    goal = Goal("fbila", None, plus=24 * GIB, quantity="peak_bytes")
    assert goal.verdict({"fbila": {"peak_bytes": 12 * GIB}})["over"] == -0.5
    assert str(goal) == "peak memory of fbila at most 24 GiB"
