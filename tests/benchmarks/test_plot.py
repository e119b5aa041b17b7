"""Plots and tables are drawn from the JSON alone."""

import json

import pytest
from PIL import Image

from benchmarks import plot, tables


@pytest.fixture
def path(result, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    return path


def test_plots(path, tmp_path):
    plot.main([str(path), "--output", str(tmp_path / "plots")])
    files = sorted((tmp_path / "plots").iterdir())
    assert [file.name for file in files] == ["floor_by_head_dim.png", "time_by_length.png"]
    for file in files:
        picture = Image.open(file).convert("RGB")
        assert min(picture.size) > 500
        assert len(picture.getcolors(2**24)) > 20


def test_everything_measured_is_in_the_plot(result):
    figure = plot.time_by_length(plot.sweep(result, "N"), result["machine"])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["eager PyTorch", "torch.compile", "softmax attention", "flash_bla", "fbila",
                      "floor (bytes / copy)"]  # fmt: skip
    forward, _ = figure.axes
    lengths = {line.get_label(): len(line.get_xdata()) for line in forward.get_lines()}
    assert lengths["fbila"] == 6
    assert lengths["softmax attention"] == 5  # absent at the longest
    assert (forward.get_xscale(), forward.get_yscale()) == ("log", "log")


def test_a_result_without_a_sweep(result, path):
    result["cases"] = {}
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="no measured case of the group sweep"):
        plot.main([str(path)])


def test_tables(path, capsys):
    tables.main([str(path)])
    printed = capsys.readouterr().out
    assert "- gpu: a GPU" in printed
    for group in ("sweep", "options"):
        assert f"### {group}" in printed
    assert "skipped: not yet" in printed
    for block in printed.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1
