"""Draws throughput against the side of the pictures, of each model and pass a panel.

python -m benchmarks.hosts.plot hosts.json --output plots/
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plot import STYLES, finish
from ..results import read
from .models import HOSTS
from .report import throughput

ATTENTIONS = {"softmax": "sdpa", "linear": "fbila"}
# By mode: the line, and how the marker is filled.
MODES = {"eager": ("-", "full"), "compiled": ("--", "none")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts.plot", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.hosts")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR")
    args = parser.parse_args(argv)
    content = read(args.result)
    panels = by_panel(content)
    if not panels:
        raise SystemExit(f"{args.result} has no measured row of {' or '.join(ATTENTIONS)}.")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "host_throughput.png"
    throughput_by_side(panels, content["machine"]).savefig(path, dpi=160)
    plt.close("all")
    print(path)


def by_panel(content: dict) -> dict[tuple[str, str], list[dict]]:
    """The records with times that belong into the plot, by model and pass, in order of sides."""
    found: dict[tuple[str, str], list[dict]] = {}
    for record in sorted(content["cases"].values(), key=lambda record: record["case"]["px"]):
        if any("ms" in record.get("attentions", {}).get(name, {}) for name in ATTENTIONS):
            case = record["case"]
            found.setdefault((case["host"], case["kind"]), []).append(record)
    return dict(sorted(found.items()))


def throughput_by_side(panels: dict[tuple[str, str], list[dict]], machine: dict) -> Figure:
    figure, axes = plt.subplots(
        1, len(panels), figsize=(1.8 + 4.6 * len(panels), 4.4), layout="constrained", squeeze=False
    )
    for panel, ((host, kind), records) in zip(axes.flat, panels.items(), strict=True):
        _draw(panel, records)
        panel.set_title(f"{HOSTS[host].title}, {kind}")
    fullest = max(axes.flat, key=lambda panel: len(panel.get_lines()))
    return finish(figure, fullest, "Throughput, bfloat16", machine)


def _draw(panel: Axes, records: list[dict]) -> None:
    for mode, (dash, fill) in MODES.items():
        for name, style in ATTENTIONS.items():
            points = [
                (record["case"]["px"], rate)
                for record in records
                if record["case"]["mode"] == mode
                and (rate := throughput(record["attentions"].get(name, {}), record)) is not None
            ]
            if points:
                colour, marker = STYLES[style]
                panel.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=dash,
                           fillstyle=fill, markersize=5, label=f"{name}, {mode}")  # fmt: skip
    sides = sorted({record["case"]["px"] for record in records})
    panel.set(xscale="log", yscale="log", xlabel="pixels along each side", ylabel="images / s")
    panel.set_xticks(sides, [str(px) for px in sides])
    panel.xaxis.minorticks_off()
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    main()
