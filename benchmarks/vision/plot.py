"""Draws how many times as fast fbila is as the official operations, eager and compiled.

python -m benchmarks.vision.plot vision.json --output plots/
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plot import STYLES, finish
from ..results import read
from .models import HOSTS
from .tables import gain, size

# Label -> whose time is divided by whose, and the colour and shade of the bars.
BARS = {
    "eager / fbila": ("eager", "fbila", STYLES["eager"][0], 1.0),
    "compiled / fbila": ("compiled", "fbila", STYLES["compiled"][0], 1.0),
    "compiled / fbila compiled": ("compiled", "fbila compiled", STYLES["compiled"][0], 0.45),
}
# Records, from which on names are too wide for their bars.
MANY = 10


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision.plot", description=__doc__)
    parser.add_argument("result", type=Path, metavar="JSON", help="made by benchmarks.vision")
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR")
    args = parser.parse_args(argv)
    content = read(args.result)
    panels = by_panel(content)
    if not panels:
        raise SystemExit(f"{args.result} has no measured row.")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "vision_gains.png"
    gains(panels, content["machine"]).savefig(path, dpi=160)
    plt.close("all")
    print(path)


def by_panel(content: dict) -> dict[tuple[str, str], list[dict]]:
    """The records with both times of a bar at least, by part and pass."""
    found: dict[tuple[str, str], list[dict]] = {}
    for record in content["cases"].values():
        if any(_height(record, bar) is not None for bar in BARS):
            case = record["case"]
            found.setdefault((case["part"], case["kind"]), []).append(record)
    return found


def gains(panels: dict[tuple[str, str], list[dict]], machine: dict) -> Figure:
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 1.0 + 3.2 * len(panels)), layout="constrained", squeeze=False
    )
    for panel, ((part, kind), records) in zip(axes.flat, panels.items(), strict=True):
        _draw(panel, records)
        panel.set_title(f"{part}, {kind}")
    fullest = max(axes.flat, key=lambda panel: len(panel.containers))
    return finish(figure, fullest, "Time of the official operations over fbila's, bf16", machine)


def _height(record: dict, bar: str) -> float | None:
    reference, way, _, _ = BARS[bar]
    outcomes = record.get("attentions", {})
    return gain(outcomes.get(way, {}), outcomes, reference)


def _names(records: list[dict]) -> list[str]:
    """Upright in lines, or in one each where there are so many that they have to lean."""
    titles = [HOSTS[record["case"]["host"]].title for record in records]
    sizes = [size(record["case"]) for record in records]
    if len(records) > MANY:
        return [f"{title}, {of}" for title, of in zip(titles, sizes, strict=True)]
    titles = [title.replace("-", "-\n", 1) if len(title) > 10 else title for title in titles]
    return [f"{title}\n{of}" for title, of in zip(titles, sizes, strict=True)]


def _draw(panel: Axes, records: list[dict]) -> None:
    shown = [bar for bar in BARS if any(_height(record, bar) is not None for record in records)]
    width = 0.8 / len(shown)
    for number, bar in enumerate(shown):
        _, _, colour, alpha = BARS[bar]
        places = [i + (number - (len(shown) - 1) / 2) * width for i in range(len(records))]
        heights = [_height(record, bar) or 0 for record in records]
        panel.bar(places, heights, width, color=colour, alpha=alpha, label=bar)
    panel.axhline(1, color="black", linewidth=0.8)
    goals = [goal for goal in records[0]["case"]["goals"] if goal["quantity"] == "ms"]
    if goals:
        panel.axhline(1 / goals[0]["factor"], color="black", linestyle=":", label="goal")
    lean = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(records) > MANY else {}
    panel.set_xticks(range(len(records)), _names(records), fontsize=8, **lean)
    panel.set_ylabel("times as fast")
    panel.grid(alpha=0.3, axis="y")


if __name__ == "__main__":
    main()
