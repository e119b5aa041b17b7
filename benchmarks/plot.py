"""Draws the sweeps of a result: time against length, and the fraction of the floor by head dim.

python -m benchmarks.plot results.json --output plots/
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import read

# Okabe and Ito's colours, which the colour-blind can tell apart; markers tell them apart in print.
STYLES = {
    "fbila": ("#0072B2", "o"),
    "eager": ("#D55E00", "s"),
    "compiled": ("#E69F00", "^"),
    "flash_bla": ("#009E73", "D"),
    "sdpa": ("#CC79A7", "v"),
}
LABELS = {
    "eager": "eager PyTorch",
    "compiled": "torch.compile",
    "sdpa": "softmax attention",
}
PASS_STYLES = {"forward": ("#0072B2", "o"), "backward": ("#D55E00", "s")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.ops")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR")
    args = parser.parse_args(argv)
    content = read(args.result)
    args.output.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name, axis, draw in (
        ("time_by_length", "N", time_by_length),
        ("floor_by_head_dim", "D", floor_by_head_dim),
    ):
        records = sweep(content, axis)
        if records:
            path = args.output / f"{name}.png"
            draw(records, content["machine"]).savefig(path, dpi=160)
            plt.close("all")
            print(path)
            drawn += 1
    if not drawn:
        raise SystemExit(f"{args.result} has no measured case of the group sweep.")


def sweep(content: dict, axis: str) -> list[dict]:
    """The measured records that vary `axis`, in its order."""
    records = [
        record
        for record in content["cases"].values()
        if record["case"]["axis"] == axis and record["status"] == "measured"
    ]
    return sorted(records, key=lambda record: record["case"][axis])


def time_by_length(records: list[dict], machine: dict) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for panel, kind in zip(panels, ("forward", "backward"), strict=True):
        rows = [(record["case"]["N"], record["passes"][kind]) for record in records]
        names = {name: None for _, row in rows for name in row["peers"]}
        for name in names:
            points = [
                (N, row["peers"][name]["ms"]) for N, row in rows if "ms" in row["peers"][name]
            ]
            _line(panel, points, LABELS.get(name, name), *STYLES[name], width=1.3)
        _line(panel, [(N, row["ms"]) for N, row in rows], "fbila", *STYLES["fbila"], width=2.4)
        lengths, low, high = zip(*((N, row["ms_20"], row["ms_80"]) for N, row in rows), strict=True)
        panel.fill_between(lengths, low, high, color=STYLES["fbila"][0], alpha=0.2, linewidth=0)
        floor = [row["floor_ms"] for _, row in rows]
        panel.plot(lengths, floor, color="black", linestyle="--", label="floor (bytes / copy)")
        panel.set(xscale="log", yscale="log", title=kind, xlabel="tokens N", ylabel="time (ms)")
        panel.set_xticks(lengths, [f"{N:,}" for N in lengths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    case = records[0]["case"]
    shape = f"batch {case['B']}, {case['H']} heads, head dim {case['D']}, {case['dtype']}"
    return finish(figure, panels[0], f"{case['operator']}, {shape}", machine)


def floor_by_head_dim(records: list[dict], machine: dict) -> Figure:
    figure, panel = plt.subplots(figsize=(8, 4.4), layout="constrained")
    places = range(len(records))
    for kind, (colour, marker) in PASS_STYLES.items():
        fractions = [record["passes"][kind]["floor_fraction"] for record in records]
        _line(panel, list(zip(places, fractions, strict=True)), kind, colour, marker, width=2)
    panel.axhline(1, color="black", linestyle="--", label="a copy of the bytes")
    panel.set(xlabel="head dim D", ylabel="fraction of the speed of a copy")
    panel.set_xticks(places, [record["case"]["D"] for record in records])
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    case = records[0]["case"]
    return finish(
        figure,
        panel,
        f"{case['operator']}, {case['dtype']}, about equal bytes at each head dim",
        machine,
    )


def _line(
    panel: Axes, points: list[tuple], label: str, colour: str, marker: str, width: float
) -> None:
    if points:
        x, y = zip(*points, strict=True)
        panel.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=width, label=label)


def finish(figure: Figure, panel: Axes, title: str, machine: dict) -> Figure:
    """The title with the machine below it, and a legend beside the panels."""
    versions = f"{machine['gpu']}, PyTorch {machine['torch']}, Triton {machine['triton']}"
    figure.suptitle(f"{title}\n{versions}", fontsize=10)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    main()
