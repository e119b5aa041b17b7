"""Labelled pictures that need no download: shapes in noise (see `scenes.py`), one of them larger.

What the large one is, of seven shapes, is the label; its place, colour, angle and size say nothing
of it, and the others are there to be mistaken for it.
"""

from functools import cache

import torch
from scenes import COLOURS, PLACES, SHAPES, Scenes, render
from torch import Tensor

CLASSES = len(SHAPES)
# Radii and centres as fractions of the side.
LARGE, SMALL = (0.15, 0.22), (0.07, 0.11)
MARGIN = 0.25
OTHERS = 4
# Held-out pictures are those of seeds that no training picture has.
HELD_OUT = 10**9


def sample_labelled(n: int, seed: int) -> tuple[Scenes, Tensor]:
    """`n` scenes and their labels, on the CPU; the same seed gives the same ones."""
    g = torch.Generator().manual_seed(seed)
    slots = (n, 1 + OTHERS)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=g)

    shape = torch.randint(len(SHAPES), slots, generator=g)
    label = shape[:, 0].clone()
    place = torch.rand(n, len(PLACES), generator=g).argsort(1)[:, : 1 + OTHERS]
    centre = torch.tensor(list(PLACES.values()))[place] + uniform(-0.05, 0.05, *slots, 2)
    centre[:, 0] = uniform(MARGIN, 1 - MARGIN, n, 2)
    radius = uniform(*SMALL, *slots)
    radius[:, 0] = uniform(*LARGE, n)
    # What the large one would touch is left out: pictures are drawn without an order of objects.
    apart = (centre[:, 1:] - centre[:, :1]).norm(dim=-1)
    touches = apart < 1.1 * (radius[:, 1:] + radius[:, :1])
    shape[:, 1:].masked_fill_(touches, -1)
    ground = torch.randint(len(COLOURS), (n,), generator=g)
    # A step of 1 .. 7 round the palette from the ground's colour never lands on it again.
    step = torch.randint(1, len(COLOURS), slots, generator=g)
    colour = (ground[:, None] + step) % len(COLOURS)
    angle = uniform(-torch.pi, torch.pi, *slots)
    return Scenes(ground, colour, shape, place, centre, radius, angle), label


@cache
def draw(n: int, size: int, seed: int, noise: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """`n` pictures `(n, 3, size, size)` in uint8 and their labels; kept for the next call."""
    pictures, labels = [], []
    # As many pictures at a time as go round on a small GPU.
    chunk = 2**21 // size**2
    for start in range(0, n, chunk):
        scenes, label = sample_labelled(min(chunk, n - start), seed + start)
        drawn = render(scenes, size, device)
        # From the CPU's random numbers, which are the same on all machines.
        grain = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(seed + start))
        drawn = (drawn + noise * grain.to(device)).clamp_(0, 1)
        pictures.append((255 * drawn).round_().to(torch.uint8))
        labels.append(label.to(device))
    return torch.cat(pictures), torch.cat(labels)
