"""Scores for `evaluate.py`: how many pictures are right, how sure that is, and tables of it."""

import math
from collections import Counter

from scene_reader import Reading, compare, rates
from scenes import Scene

COLUMNS = {  # heading -> name in the rates
    "all right": "all",
    "colour": "colours",
    "shape": "shapes",
    "place": "places",
    "ground": "ground",
    "count": "count",
}


def score(readings: list[Reading], scenes: list[Scene]) -> dict:
    """The rates of `scene_reader`, the 95 % interval of the strict one, and who is right in all.

    `all` asks for the ground's colour and exactly the caption's set of (colour, shape, place);
    `objects_exact` for the set alone, whatever the ground.
    """
    pairs = list(zip(readings, scenes, strict=True))
    right = [compare(reading, scene)["all"] for reading, scene in pairs]
    exact = sum(Counter(r.objects) == Counter(map(tuple, s.objects)) for r, s in pairs)
    return {
        "rates": rates(readings, scenes) | {"objects_exact": exact / len(pairs)},
        "all_interval": wilson(sum(right), len(right)),
        "right": right,
    }


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval for a share of which `right` out of `n` were seen."""
    z = 1.96
    middle = (right + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(right * (n - right) / n + z * z / 4)
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def count_pairs(rows: list[dict]) -> list[dict]:
    """For each size, how many captions both attentions, one of them or none got all right."""
    right = {(row["attention"], row["size"]): row["right"] for row in rows}
    out = []
    for (attention, size), softmax in right.items():
        linfusion = right.get(("linfusion", size))
        if attention == "softmax" and linfusion:
            both = sum(a and b for a, b in zip(softmax, linfusion, strict=True))
            out.append(
                {
                    "size": size,
                    "both": both,
                    "softmax_only": sum(softmax) - both,
                    "linfusion_only": sum(linfusion) - both,
                    "neither": len(softmax) - sum(softmax) - sum(linfusion) + both,
                }
            )
    return out


def table(rows: list[dict], heads: dict[str, str]) -> str:
    """The rows in Markdown: first the columns `heads` (heading -> key), then the rates."""
    seconds = "seconds" in rows[0]
    headings = [*heads, *COLUMNS, *(["seconds"] if seconds else [])]
    lines = ["| " + " | ".join(headings) + " |"]
    lines.append("|" + ":--|" * len(heads) + "--:|" * (len(headings) - len(heads)))
    for row in rows:
        cells = [str(row[key]) for key in heads.values()]
        cells += [f"{row['rates'][name]:.1%}" for name in COLUMNS.values()]
        cells += [f"{row['seconds']:.1f}"] if seconds else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
