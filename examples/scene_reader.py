"""Reads a scene back out of a picture by rules: the ground's colour, and every object's colour,
shape and place. Nothing here is learned, and the caption is never consulted.

Light and shadow only scale the ground's colour, so how far a pixel's colour is from the line
through black and the ground's colour says how much of an object covers it, in the shadow as in
the light. The covered pixels fall into connected parts. Each part is one object: its colour is
the nearest of the palette, its shape the one whose outline, at the part's own area and centre and
at some tilt, overlaps it best, and its place the one its centre is near. An attribute that is not
clearly one of those that captions can name reads as None, and any part that a person would see
counts as an object, so stray blobs and half-formed shapes make a picture wrong.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scenes import COLOURS, PLACES, SHAPES, Scene, signed_distance
from torch import Tensor

SIZE = 128  # pictures of any size are read at this one
CROP = 64  # an object is at most 40 pixels wide
GRID = 48  # outlines are compared at this size

FOREIGN = 0.10  # distance in RGB from the ground's line at which a pixel is not ground
SPECK = 12  # parts of fewer pixels are not seen as objects
NEAR_COLOUR = 0.13  # RGB, from the line through black and the palette's colour
NEAR_PLACE = 0.08  # of the side, in x and in y; neighbouring places are 0.33 apart
OVERLAP = 0.80  # intersection over union with the best outline
CLEARER = 0.015  # by which the best shape's overlap exceeds the next shape's
TILTS = tuple(math.radians(d) for d in range(-24, 25, 4))


class Reading(NamedTuple):
    """What was read: a colour or None, and `(colour, shape, place)` triples with Nones."""

    ground: str | None
    objects: tuple[tuple[str | None, str | None, str | None], ...]


def read(pictures: Tensor) -> list[Reading]:
    """Reads `(n, 3, height, width)` pictures in [0, 1], on their own device."""
    return [reading for chunk in pictures.float().split(128) for reading in _read(chunk)]


def compare(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether a reading agrees with a scene, in each respect and in `all` of them at once."""
    agree = {
        "all": reading.ground == scene.ground
        and Counter(reading.objects) == Counter(map(tuple, scene.objects)),
        "ground": reading.ground == scene.ground,
        "count": len(reading.objects) == len(scene.objects),
    }
    for index, name in enumerate(("colours", "shapes", "places")):
        agree[name] = Counter(o[index] for o in reading.objects) == Counter(
            o[index] for o in scene.objects
        )
    return agree


def rates(readings: list[Reading], scenes: list[Scene]) -> dict[str, float]:
    """Share of pictures that agree with their scene: see `compare`.

    `all` is the strict one. `colours`, `shapes` and `places` each ask for the right collection of
    that attribute over the picture's objects. `objects` is the share of named objects, over all
    pictures, that were read with colour, shape and place all right.
    """
    rows = [compare(r, s) for r, s in zip(readings, scenes, strict=True)]
    out = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    found = sum(
        sum(tuple(o) in r.objects for o in s.objects) for r, s in zip(readings, scenes, strict=True)
    )
    return out | {"objects": found / sum(len(s.objects) for s in scenes)}


def _read(pictures: Tensor) -> list[Reading]:
    if pictures.shape[-2:] != (SIZE, SIZE):
        pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
    ground, tone = _ground(pictures)
    foreign = _off_line(pictures, tone, (0.6, 1.12))
    labels = _connected(foreign > FOREIGN)
    cover = _off_line(pictures, tone, None)

    found = [[] for _ in pictures]
    for which, part in _parts(labels):
        found[which].append(part)
    which = torch.tensor([w for w, parts in enumerate(found) for _ in parts], dtype=torch.long)
    parts = torch.tensor([p for parts in found for p in parts], dtype=torch.long)
    names = iter(_objects(pictures, cover, labels, which, parts)) if len(parts) else iter(())
    colours = tuple(COLOURS)
    return [
        Reading(colours[g] if g >= 0 else None, tuple(next(names) for _ in ps))
        for g, ps in zip(ground.tolist(), found, strict=True)
    ]


def _palette(like: Tensor) -> Tensor:
    return torch.tensor(list(COLOURS.values()), dtype=like.dtype, device=like.device)


def _off_line(pictures: Tensor, tone: Tensor, span: tuple[float, float] | None) -> Tensor:
    """Distance of every pixel from the line `f * tone`, f in span, per pixel: `(n, h, w)`."""
    f = (pictures * tone).sum(1, keepdim=True) / tone.square().sum(1, keepdim=True)
    if span:
        f = f.clamp(*span)
    return (pictures - f * tone).norm(dim=1)


def _nearest_colour(colours: Tensor) -> tuple[Tensor, Tensor]:
    """Index into the palette and distance, for `(..., 3)` colours under any light."""
    palette = _palette(colours)
    f = (colours @ palette.T) / palette.square().sum(1)
    off = (colours[..., None, :] - f.clamp(0.7, 1.15)[..., None] * palette).norm(dim=-1)
    distance, index = off.min(-1)
    return index, distance


def _ground(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the ground's colour, -1 if none, `(n,)`; and its tone down the picture."""
    n = len(pictures)
    rim = torch.ones(SIZE, SIZE, dtype=torch.bool, device=pictures.device)
    rim[3:-3, 3:-3] = False
    rows = rim.nonzero()[:, 0]
    pixels = pictures[:, :, rim].transpose(1, 2)
    index, distance = _nearest_colour(pixels)
    votes = F.one_hot(index, len(COLOURS)) * (distance < NEAR_COLOUR)[..., None]
    share, ground = votes.float().mean(1).max(1)

    # The ground's light is linear in height: a weighted least-squares line per channel.
    mine = ((index == ground[:, None]) & (distance < NEAR_COLOUR)).float()[..., None]
    y = (rows / SIZE).expand(n, -1)[..., None]
    total = mine.sum(1, keepdim=True).clamp(min=1)
    y_mean = (mine * y).sum(1, keepdim=True) / total
    mean = (mine * pixels).sum(1, keepdim=True) / total
    spread = (mine * (y - y_mean).square()).sum(1, keepdim=True).clamp(min=1e-6)
    slope = (mine * (y - y_mean) * (pixels - mean)).sum(1, keepdim=True) / spread
    down = (torch.arange(SIZE, device=pictures.device) / SIZE)[None, :, None]
    tone = (mean + slope * (down - y_mean)).clamp(0.02, 1).transpose(1, 2)[..., None]
    return torch.where(share > 0.6, ground, -1), tone


def _connected(mask: Tensor) -> Tensor:
    """Labels each connected part of `(n, h, w)` masks by its largest pixel number; 0 is outside."""
    _, h, w = mask.shape
    number = torch.arange(1, h * w + 1, dtype=torch.float32, device=mask.device).view(1, h, w)
    labels = number * mask
    while True:
        before = labels
        for _ in range(8):
            labels = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(before, labels):
            return labels.long()


def _parts(labels: Tensor) -> list[tuple[int, int]]:
    """`(picture, label)` of every part large enough to be seen."""
    n = len(labels)
    keys = labels.flatten(1) + torch.arange(n, device=labels.device)[:, None] * (SIZE**2 + 1)
    keys, counts = keys[labels.flatten(1) > 0].unique(return_counts=True)
    keys = keys[counts >= SPECK].tolist()
    return [(key // (SIZE**2 + 1), key % (SIZE**2 + 1)) for key in keys]


def _objects(pictures, cover, labels, which, parts):
    """`(colour, shape, place)` of each part, given as `(m,)` picture and label numbers."""
    which, parts = which.to(labels.device), parts.to(labels.device)
    mask = labels[which] == parts[:, None, None]
    axis = torch.arange(SIZE, device=labels.device)
    across, along = mask.any(1), mask.any(2)
    first = torch.stack([across.int().argmax(1), along.int().argmax(1)], 1)
    last = torch.stack(
        [SIZE - 1 - across.flip(1).int().argmax(1), SIZE - 1 - along.flip(1).int().argmax(1)], 1
    )
    fits = (last - first < CROP - 4).all(1)
    corner = ((first + last) // 2 - CROP // 2).clamp(0, SIZE - CROP)
    window = axis[:CROP]
    columns = (corner[:, 0, None] + window)[:, None, :]
    rows = (corner[:, 1, None] + window)[:, :, None]
    mine = mask[torch.arange(len(parts), device=mask.device)[:, None, None], rows, columns]
    depth = cover[which[:, None, None], rows, columns]
    pixels = pictures.permute(0, 2, 3, 1)[which[:, None, None], rows, columns]

    # The object's own colour is that of its more covered half; at the edge the ground mixes in.
    nan = torch.tensor(float("nan"), device=depth.device)
    middle = torch.where(mine, depth, nan).flatten(1).nanmedian(1).values
    inner = mine & (depth >= middle[:, None, None])
    own = torch.where(inner[..., None], pixels, nan).flatten(1, 2).nanmedian(1).values
    colour, distance = _nearest_colour(own)
    full = torch.where(inner, depth, nan).flatten(1).nanmedian(1).values

    # One pixel more on every side, for what of the soft edge the mask's threshold left out.
    reach = F.max_pool2d(mine.float()[:, None], 3, 1, 1)[:, 0]
    soft = (depth / full[:, None, None]).clamp(0, 1) * reach
    centre, outline = _normalise(soft)
    overlap = _overlaps(outline)
    best = overlap.topk(2, dim=1)
    clear = (best.values[:, 0] > OVERLAP) & (best.values[:, 0] - best.values[:, 1] > CLEARER)

    middle = (corner + centre) / SIZE
    places = torch.tensor(list(PLACES.values()), device=middle.device)
    off, place = (middle[:, None] - places).abs().amax(-1).min(1)
    colours, shapes, names = tuple(COLOURS), SHAPES, tuple(PLACES)
    return [
        (
            colours[c] if colour_ok else None,
            shapes[s] if shape_ok else None,
            names[p] if place_ok else None,
        )
        for c, colour_ok, s, shape_ok, p, place_ok in zip(
            colour.tolist(),
            (distance < NEAR_COLOUR).tolist(),
            best.indices[:, 0].tolist(),
            (clear & fits).tolist(),
            place.tolist(),
            (off < NEAR_PLACE).tolist(),
            strict=True,
        )
    ]


def _normalise(soft: Tensor) -> tuple[Tensor, Tensor]:
    """Centre of `(m, s, s)` covers, and their outlines at unit area, `(m, GRID**2)`."""
    side = soft.shape[-1]
    solid = (soft > 0.5).float()
    area = solid.sum((1, 2)).clamp(min=1)
    axis = torch.arange(side, device=soft.device, dtype=soft.dtype) + 0.5
    centre = torch.stack([(solid * axis).sum((1, 2)), (solid * axis[:, None]).sum((1, 2))], 1)
    centre = centre / area[:, None]
    # 1.1 times the root of the area reaches past the tips of the least compact shape, the star.
    half = 1.1 * area.sqrt()
    step = torch.linspace(-1, 1, GRID, device=soft.device)
    x = (centre[:, 0, None] + half[:, None] * step) / side * 2 - 1
    y = (centre[:, 1, None] + half[:, None] * step) / side * 2 - 1
    grid = torch.stack(
        [x[:, None, :].expand(-1, GRID, -1), y[:, :, None].expand(-1, -1, GRID)], dim=-1
    )
    outline = F.grid_sample(soft[:, None], grid, align_corners=False)[:, 0]
    return centre, (outline > 0.5).float().flatten(1)


def _overlaps(outlines: Tensor) -> Tensor:
    """Best intersection over union with each shape at any of `TILTS`: `(m, len(SHAPES))`."""
    axis = torch.linspace(-1.6, 1.6, 256, device=outlines.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    overlap = []
    for shape in SHAPES:
        tilts = (0.0,) if shape in ("circle", "ring") else TILTS
        turned = [
            signed_distance(
                shape, x * math.cos(t) + y * math.sin(t), y * math.cos(t) - x * math.sin(t)
            )
            for t in tilts
        ]
        ideal = _normalise((torch.stack(turned) < 0).float())[1]
        both = outlines @ ideal.T
        either = outlines.sum(1, keepdim=True) + ideal.sum(1) - both
        overlap.append((both / either).amax(1))
    return torch.stack(overlap, 1)
