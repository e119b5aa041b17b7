"""Draws the curves of `compare_vit.py`: mean over seeds, from the least to the greatest behind it.

python examples/plot_vit.py outputs/vit/results.json --output examples/vit_curves.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

TITLES = {"scratch": "from nothing", "finetune": "from softmax weights"}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """A running mean over the last `window` values, of fewer at the start."""
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), 1)
    last = np.arange(1, values.shape[1] + 1)
    first = np.maximum(0, last - window)
    return (sums[:, last] - sums[:, first]) / (last - first)


def draw(axis, runs: list[dict], name: str, curve) -> None:
    steps, values = zip(*(curve(run) for run in runs if run["attention"] == name), strict=True)
    values = np.array(values)
    few = "o" if len(steps[0]) < 40 else ""
    (line,) = axis.plot(steps[0], values.mean(0), label=name, marker=few, markersize=3)
    axis.fill_between(
        steps[0], values.min(0), values.max(0), color=line.get_color(), alpha=0.2, lw=0
    )


def losses(run: dict) -> tuple[list[int], list[float]]:
    window = max(1, len(run["steps"]) // 30)
    return run["steps"], smooth(np.array([run["losses"]]), window)[0].tolist()


def accuracies(run: dict) -> tuple[list[int], list[float]]:
    return (
        [epoch["step"] for epoch in run["epochs"]],
        [100 * epoch["accuracy"] for epoch in run["epochs"]],
    )


def figure(results: dict):
    stages = [stage for stage in TITLES if stage in results]
    fig, axes = plt.subplots(
        len(stages), 2, figsize=(9, 3.3 * len(stages)), squeeze=False, layout="constrained"
    )
    for row, stage in zip(axes, stages, strict=True):
        runs, rows = results[stage]["runs"], results[stage]["summary"]
        for name, numbers in rows.items():
            draw(row[0], runs, name, losses)
            draw(row[1], runs, name, accuracies)
            row[1].lines[-1].set_label(f"{name}: {numbers['mean']:.1f} %")
        row[0].set(title=TITLES[stage], xlabel="step", ylabel="training loss")
        row[1].set(title=TITLES[stage], xlabel="step", ylabel="held-out accuracy, %")
        for axis in row:
            axis.grid(alpha=0.3)
        row[0].legend()
        row[1].legend(loc="lower right")
    return fig


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of compare_vit.py")
    parser.add_argument("--output", type=Path, default=Path("vit_curves.png"))
    args = parser.parse_args(arguments)
    figure(json.loads(args.results.read_text())).savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
