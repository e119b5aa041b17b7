"""Small pictures with captions: coloured shapes at named places on a coloured ground.

A `Scenes` batch holds what is in each picture as tensors, so that hundreds of pictures are drawn
at once on whichever device is at hand; a `Scene` is the same content in words, which captions are
made of and which `scene_reader` reads back out of a picture. Every shape is a signed distance
function, so a picture drawn at 256 is the one drawn at 128, only sharper.

    scenes = sample_scenes(4, seed=0)
    pictures = render(scenes, 128)  # (4, 3, 128, 128) in [0, 1]
    captions = [caption(scene, random.Random(0)) for scene in scenes.describe()]
"""

import math
import random
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

COLOURS = {
    "red": (0.86, 0.19, 0.20),
    "orange": (0.95, 0.55, 0.12),
    "yellow": (0.98, 0.84, 0.25),
    "green": (0.22, 0.65, 0.36),
    "blue": (0.18, 0.42, 0.85),
    "purple": (0.52, 0.28, 0.74),
    "pink": (0.96, 0.60, 0.75),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
# Name -> centre (x, y), as fractions of the side; y grows downwards.
PLACES = {
    "in the top left": (0.17, 0.17),
    "at the top": (0.50, 0.17),
    "in the top right": (0.83, 0.17),
    "on the left": (0.17, 0.50),
    "in the center": (0.50, 0.50),
    "on the right": (0.83, 0.50),
    "in the bottom left": (0.17, 0.83),
    "at the bottom": (0.50, 0.83),
    "in the bottom right": (0.83, 0.83),
}
MAX_OBJECTS = 3
# With these, neighbouring objects never touch and nothing leaves the picture.
JITTER = 0.02
RADIUS = (0.115, 0.14)
TILT = math.radians(15)


class Object(NamedTuple):
    """One object of a scene, in the words of its caption."""

    colour: str
    shape: str
    place: str


class Scene(NamedTuple):
    """What a caption says: the ground's colour and the objects, in no particular order."""

    ground: str
    objects: frozenset[Object]


@dataclass
class Scenes:
    """`n` scenes as tensors; a slot that holds no object has `shape == -1`.

    Attributes:
        ground: `(n,)`, index into `COLOURS`.
        colour, shape, place: `(n, MAX_OBJECTS)`, indices into `COLOURS`, `SHAPES`, `PLACES`.
        centre: `(n, MAX_OBJECTS, 2)`, x and y as fractions of the side.
        radius, angle: `(n, MAX_OBJECTS)`, fraction of the side and radians.
    """

    ground: Tensor
    colour: Tensor
    shape: Tensor
    place: Tensor
    centre: Tensor
    radius: Tensor
    angle: Tensor

    def __len__(self) -> int:
        return self.ground.shape[0]

    def __getitem__(self, index) -> "Scenes":
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device) -> "Scenes":
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    def describe(self) -> list[Scene]:
        """The scenes in words."""
        colours, places = tuple(COLOURS), tuple(PLACES)
        rows = zip(
            self.ground.tolist(),
            self.colour.tolist(),
            self.shape.tolist(),
            self.place.tolist(),
            strict=True,
        )
        return [
            Scene(
                colours[ground],
                frozenset(
                    Object(colours[c], SHAPES[s], places[p])
                    for c, s, p in zip(*slots, strict=True)
                    if s >= 0
                ),
            )
            for ground, *slots in rows
        ]


def sample_scenes(n: int, seed: int) -> Scenes:
    """Draws `n` scenes of one to three objects, on the CPU; the same seed gives the same scenes."""
    g = torch.Generator().manual_seed(seed)
    slots = (n, MAX_OBJECTS)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=g)

    ground = torch.randint(len(COLOURS), (n,), generator=g)
    # A step of 1 .. 7 round the palette from the ground's colour never lands on it again.
    step = torch.randint(1, len(COLOURS), slots, generator=g)
    colour = (ground[:, None] + step) % len(COLOURS)
    shape = torch.randint(len(SHAPES), slots, generator=g)
    count = torch.randint(1, MAX_OBJECTS + 1, (n, 1), generator=g)
    shape[torch.arange(MAX_OBJECTS) >= count] = -1
    place = torch.rand(n, len(PLACES), generator=g).argsort(1)[:, :MAX_OBJECTS]
    centre = torch.tensor(list(PLACES.values()))[place] + uniform(-JITTER, JITTER, *slots, 2)
    radius = uniform(*RADIUS, *slots)
    angle = uniform(-TILT, TILT, *slots)
    return Scenes(ground, colour, shape, place, centre, radius, angle)


def caption(scene: Scene, rng: random.Random) -> str:
    """Says a scene in words: `rng` picks the objects' order and one of a few phrasings."""
    # Sorted first, so that the order depends on rng alone and not on the set's hashes.
    things = [f"{_a(o.colour)} {o.shape} {o.place}" for o in sorted(scene.objects)]
    rng.shuffle(things)
    listed = " and ".join([", ".join(things[:-1]), things[-1]] if things[1:] else things)
    ground = f"{_a(scene.ground)} background"
    return rng.choice((f"{listed} on {ground}", f"{listed}, {ground}", f"{ground} with {listed}"))


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def render(scenes: Scenes, size: int, device: str | torch.device = "cpu") -> Tensor:
    """Draws scenes as `(n, 3, size, size)` float32 pictures in [0, 1].

    The ground is a soft vertical gradient; each object casts a soft shadow on it, is lit from the
    upper left and is antialiased over one pixel.
    """
    scenes = scenes.to(device)
    palette = torch.tensor(list(COLOURS.values()), device=device)
    axis = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    which, slot = (scenes.shape >= 0).nonzero(as_tuple=True)
    shape = scenes.shape[which, slot]
    centre = scenes.centre[which, slot][:, :, None, None]
    radius = scenes.radius[which, slot][:, None, None]
    angle = scenes.angle[which, slot][:, None, None]

    def distance(drop: float) -> Tensor:
        dx, dy = x - centre[:, 0] - 0.4 * drop, y - centre[:, 1] - drop
        u = (dx * angle.cos() + dy * angle.sin()) / radius
        v = (dy * angle.cos() - dx * angle.sin()) / radius
        out = torch.empty_like(u)
        for index, name in enumerate(SHAPES):
            mine = (shape == index).nonzero()[:, 0]
            out[mine] = signed_distance(name, u[mine], v[mine])
        return out * radius

    light = 1.03 - 0.15 * y
    pictures = palette[scenes.ground][:, :, None, None] * light
    pictures += 0.05 * (1 - y)

    shade = torch.zeros(len(scenes), size, size, device=device)
    shade.index_add_(0, which, 0.34 * torch.sigmoid(-distance(0.022) / 0.008))
    pictures *= (1 - shade.clamp(max=0.34))[:, None]

    edge = distance(0.0)
    cover = (0.5 - edge * size).clamp(0, 1)
    dx, dy = (x - centre[:, 0]) / radius, (y - centre[:, 1]) / radius
    light = (1.02 - 0.05 * dx - 0.09 * dy) * (1 - 0.14 * torch.exp(edge / 0.010).clamp(max=1))
    gloss = 0.22 * torch.exp(-((dx + 0.30) ** 2 + (dy + 0.35) ** 2) / 0.10)
    tint = palette[scenes.colour[which, slot]][:, :, None, None] * light[:, None]
    tint = tint + (1 - tint) * gloss[:, None]
    # Objects never overlap, so what each adds to its picture can be summed in any order.
    pictures.index_add_(0, which, cover[:, None] * (tint - pictures[which]))
    return pictures.clamp_(0, 1)


def signed_distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance of each point to the edge of a shape of radius about 1, negative inside.

    `x` and `y` are of one shape, y growing downwards. The triangle, star and heart follow
    https://iquilezles.org/articles/distfunctions2d/.
    """
    if shape == "circle":
        return torch.hypot(x, y) - 0.92
    if shape == "ring":
        return (torch.hypot(x, y) - 0.70).abs() - 0.25
    if shape == "square":
        return _box(x, y, 0.76, 0.76) - 0.05
    if shape == "cross":
        return torch.minimum(_box(x, y, 0.96, 0.27), _box(x, y, 0.27, 0.96)) - 0.05
    if shape == "triangle":
        return _triangle(x, -y)
    if shape == "star":
        return _star(x, -y)
    if shape == "heart":
        return _heart(x, -y)
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    qx, qy = x.abs() - half_width, y.abs() - half_height
    outside = torch.hypot(qx.clamp(min=0), qy.clamp(min=0))
    return outside + torch.maximum(qx, qy).clamp(max=0)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Equilateral, its centroid at the origin, one corner up."""
    half, corner, root = 0.89, 0.05, math.sqrt(3)
    x, y = x.abs() - half, y + half / root
    fold = x + root * y > 0
    x, y = torch.where(fold, (x - root * y) / 2, x), torch.where(fold, (-root * x - y) / 2, y)
    x = x - x.clamp(-2 * half, 0)
    return -torch.hypot(x, y) * y.sign() - corner


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, one of them up."""
    tip, inner, corner = 1.03, 0.48, 0.04
    c1, s1 = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x = x.abs()
    for sign in (1, -1):
        mirror = 2 * (sign * c1 * x - s1 * y).clamp(min=0)
        x, y = x - mirror * sign * c1, y + mirror * s1
    x, y = x.abs(), y - tip
    bx, by = inner * s1, inner * c1 - 1
    # The edge runs from the tip at (0, 0) along (bx, by), scaled to the star's size.
    bx, by = bx * tip, by * tip
    h = ((x * bx + y * by) / (bx * bx + by * by)).clamp(0, 1)
    return torch.hypot(x - bx * h, y - by * h) * (y * bx - x * by).sign() - corner


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 0.60
    x, y = x.abs() * scale, y * scale + 0.58
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    middle = 0.5 * (x + y).clamp(min=0)
    side = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - middle, y - middle))
    return torch.where(x + y > 1, lobe, side * (x - y).sign()) / scale
