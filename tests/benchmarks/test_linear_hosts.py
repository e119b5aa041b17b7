"""The command for models that are linear already, on a CPU with tiny ones."""

import dataclasses

import pytest
import torch

from benchmarks import turns
from benchmarks.hosts import linear
from benchmarks.hosts.linear_models import draw_sana_tokens, draw_sana_video
from benchmarks.hosts.linear_rows import LINEAR_ROWS, TINY_LINEAR_ROWS
from benchmarks.hosts.models import HOSTS
from benchmarks.results import read
from fbila.adapters.acceleration import relu_attention


@pytest.fixture(autouse=True)
def light(monkeypatch):
    # Collecting garbage takes longer than a row.
    monkeypatch.setattr(turns, "free", lambda: None)


def run(path, *options) -> int:
    return linear.main(["--device", "cpu", "--seconds", "0", "--output", str(path), *options])


def test_every_tiny_row_is_measured(tmp_path):
    path = tmp_path / "linear.json"
    assert run(path) == 0
    cases = read(path)["cases"]
    assert list(cases) == [row.name for row in TINY_LINEAR_ROWS]
    for record in cases.values():
        assert record["status"] == "measured"
        assert list(record["attentions"]) == ["stock", "accelerated"]


@pytest.mark.parametrize("host", ["tiny_dc_ae", "tiny_sana_video"])
def test_what_is_wrong_has_no_time(host, tmp_path, monkeypatch):
    right = relu_attention.linear_attn
    monkeypatch.setattr(relu_attention, "linear_attn", lambda q, k, v, **kw: right(k, q, v, **kw))
    path = tmp_path / "linear.json"
    assert run(path, "--only", f"inference/eager/{host}") == 1
    (record,) = read(path)["cases"].values()
    assert record["status"] == "wrong"
    assert "ms" in record["attentions"]["stock"]
    assert "ms" not in record["attentions"]["accelerated"]


@pytest.mark.parametrize("tokens", [None, 100])
def test_what_is_too_large_for_float32_is_compared_in_16_bits(tokens, tmp_path, monkeypatch):
    """A mistake that smaller pictures do not show is found by the larger ones."""
    small = dataclasses.replace(HOSTS["tiny_dc_ae"], exact_px=16)
    monkeypatch.setitem(HOSTS, "tiny_dc_ae", small)
    right = relu_attention.linear_attn

    def attention(q, k, v, **options):
        if tokens is not None and q.shape[-2] >= tokens:
            q, k = k, q
        return right(q, k, v, **options)

    monkeypatch.setattr(relu_attention, "linear_attn", attention)
    path = tmp_path / "linear.json"
    status = run(path, "--only", "inference/eager/tiny_dc_ae")
    (record,) = read(path)["cases"].values()
    accelerated = record["attentions"]["accelerated"]
    if tokens is None:
        assert status == 0 and accelerated["errors"]["16_bits"] < 0.01
    else:
        assert status == 1 and "difference in 16 bits" in accelerated["wrong"]


def test_where_stock_is_wrong_its_time_is_taken_and_the_other_is_judged_by_itself(tmp_path):
    """SanaVideo's in float16, whose attention is NaN here and 0 for long videos."""
    path = tmp_path / "linear.json"
    assert run(path, "--only", "inference/eager/tiny_sana_video") == 0
    (record,) = read(path)["cases"].values()
    stock, accelerated = record["attentions"].values()
    assert not stock["errors"]["float32"] < 0.02 and stock["ms"] > 0
    assert accelerated["errors"]["float32"] < accelerated["errors"]["float32_bound"] == 0.02


def test_the_rows_have_a_model_and_goals():
    assert {row.host for row in LINEAR_ROWS} <= HOSTS.keys()
    for row in LINEAR_ROWS:
        if row.mode == "graph":
            assert [(goal.quantity, goal.factor) for goal in row.goals] == [("ms", 1 / 1.2)]
            continue
        *time, memory = row.goals
        alone = row.host.endswith("attention") or row.host == "lite_mla"
        short = (row.host, row.px) == ("lite_mla", 224)
        assert [goal.factor for goal in time] == ([] if short else [1 / 3 if alone else 1 / 1.2])
        assert (memory.quantity, memory.factor) == ("peak_bytes", 1)


def test_the_rows_are_in_float16_and_sana_in_bfloat16_too():
    names = {row.name for row in LINEAR_ROWS}
    assert len(names) == len(LINEAR_ROWS)
    half = {row.host for row in LINEAR_ROWS if row.kind == "inference" and row.dtype == "float16"}
    assert half == {row.host for row in LINEAR_ROWS}
    for host in ("sana_attention", "sana_1600m"):
        for px in (1024, 2048, 4096):
            assert f"inference/eager/{host}/{px}/float16" in names
        assert f"inference/eager/{host}/1024" in names
    assert {row.batch for row in LINEAR_ROWS if row.host.startswith("sana_1600m")} == {2}


def test_the_tokens_are_those_of_the_published_models():
    generator = torch.Generator()
    assert draw_sana_tokens(1024, 2, generator)["hidden_states"].shape == (2, 1024, 2240)
    video = draw_sana_video(832, 1, generator)["hidden_states"]
    assert video.shape == (1, 16, 21, 60, 104)
    assert video[0, 0, :, ::2, ::2].numel() == 32760
