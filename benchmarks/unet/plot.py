"""Draws the time of a step and its peak memory against the side of the picture.

python -m benchmarks.unet.plot unet.json --output plots/
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plot import STYLES, finish
from ..results import read

ATTENTIONS = {
    "sdpa": ("softmax", "sdpa"),
    "official": ("official LinFusion", "eager"),
    "fbila fused": ("fbila, fused", "fbila"),
    "fbila fused blocks": ("fbila, fused blocks", "flash_bla"),
}
# By group: the words, the line, and how the marker is filled.
GROUPS = {"eager": ("eager", "-", "full"), "compiled": ("compiled", "--", "none")}
TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
QUANTITIES = {"ms": ("time of a step (ms)", 1), "peak_bytes": ("peak memory (GiB)", 2**-30)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unet.plot", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.unet")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR")
    args = parser.parse_args(argv)
    content = read(args.result)
    records = by_unet(content)
    if not records:
        raise SystemExit(f"{args.result} has no measured row of {' or '.join(GROUPS)}.")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "unet_steps.png"
    step_by_side(records, content["machine"]).savefig(path, dpi=160)
    plt.close("all")
    print(path)


def by_unet(content: dict) -> dict[str, list[dict]]:
    """The records with times that belong into the plot, by UNet, in the order of their sides."""
    found: dict[str, list[dict]] = {}
    for record in sorted(content["cases"].values(), key=lambda record: record["case"]["px"]):
        if record["case"]["group"] in GROUPS and "attentions" in record:
            found.setdefault(record["case"]["unet"], []).append(record)
    return dict(sorted(found.items()))


def step_by_side(records: dict[str, list[dict]], machine: dict) -> Figure:
    figure, panels = plt.subplots(
        2, len(records), figsize=(1.8 + 4.6 * len(records), 7.6), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for column, (unet, of_unet) in enumerate(records.items()):
        for row, quantity in enumerate(QUANTITIES):
            _draw(panels[row, column], of_unet, quantity)
        panels[0, column].set_title(TITLES.get(unet, unet))
    case = next(iter(records.values()))[0]["case"]
    # Where everything is drawn: a compiled row may leave softmax out.
    fullest = max(panels.flat, key=lambda panel: len(panel.get_lines()))
    return finish(figure, fullest, f"One denoising step, float16, batch {case['batch']}", machine)


def _draw(panel: Axes, rows: list[dict], quantity: str) -> None:
    words, unit = QUANTITIES[quantity]
    for group, (how, dash, fill) in GROUPS.items():
        for name, (what, style) in ATTENTIONS.items():
            points = [
                (record["case"]["px"], unit * value)
                for record in rows
                if record["case"]["group"] == group
                and (value := record["attentions"].get(name, {}).get(quantity)) is not None
            ]
            if points:
                colour, marker = STYLES[style]
                panel.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=dash,
                           fillstyle=fill, markersize=5, label=f"{what}, {how}")  # fmt: skip
    sides = sorted({record["case"]["px"] for record in rows})
    panel.set(xscale="log", yscale="log", xlabel="pixels along each side", ylabel=words)
    panel.set_xticks(sides, [str(px) for px in sides])
    panel.xaxis.minorticks_off()
    panel.grid(alpha=0.3)


if __name__ == "__main__":
    main()
