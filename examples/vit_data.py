"""Labelled pictures for `train_vit.py`: a folder's, through timm, or drawn ones.

The drawn ones need no download: shapes in noise (see `scenes.py`), one of which is larger than the
others. What it is, of seven shapes, is the label; its place, colour, angle and size say nothing of
it, and the others are there to be mistaken for it.

A loader goes over batches `x (b, 3, size, size)`, normalised, and `y (b,)`, on its device.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from scenes import COLOURS, PLACES, SHAPES, Scenes, render
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader
from torch import Tensor

# Radii and centres as fractions of the side.
LARGE, SMALL = (0.15, 0.22), (0.07, 0.11)
MARGIN = 0.25
OTHERS = 4
# Held-out pictures are those of seeds that no training picture has.
HELD_OUT = 10**9


class Drawn:
    """Drawn pictures, in a new order and randomly mirrored in each round of training.

    Args:
        pictures: `(n, 3, size, size)` uint8.
        labels: `(n,)`.
        batch_size: Pictures a batch; in training a smaller last one is left out.
        training: Whether to shuffle and mirror, by torch's global random numbers.
        rank, world: This process, of how many; each has its share of each round.
    """

    def __init__(
        self, pictures: Tensor, labels: Tensor, batch_size: int, *, training: bool,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.pictures, self.labels, self.batch_size = pictures, labels, batch_size
        self.training, self.rank, self.world = training, rank, world

    def __len__(self) -> int:
        share = len(self.labels) // self.world
        return share // self.batch_size if self.training else -(-share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.labels)
        order = torch.randperm(n) if self.training else torch.arange(n)
        share = order[self.rank :: self.world][: n // self.world].to(self.labels.device)
        for chosen in share.split(self.batch_size)[: len(self)]:
            x = self.pictures[chosen].float().div_(127.5).sub_(1)
            if self.training:
                for side in (2, 3):
                    mirrored = torch.rand(len(x)).to(x.device) < 0.5
                    x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(side), x)
            yield x, self.labels[chosen]


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


def drawn_loaders(args, accelerator) -> tuple[Drawn, Drawn, int]:
    """Loaders for training and held-out pictures, and the number of classes."""
    draw_ = lambda n, seed: draw(n, args.size, seed, args.noise, accelerator.device)  # noqa: E731
    rank, world = accelerator.process_index, accelerator.num_processes
    training = Drawn(
        *draw_(args.pictures, 0), args.batch_size, training=True, rank=rank, world=world
    )
    # Every process looks at all of them: they are few.
    held_out = Drawn(*draw_(args.held_out, HELD_OUT), args.batch_size, training=False)
    return training, held_out, len(SHAPES)


def folder_loaders(args, accelerator):
    """The same for a folder with a folder of pictures for each class in `train` and `val`."""
    root = Path(args.data)
    sets = {
        split: create_dataset("", root=str(root), split=split, is_training=split == "train")
        for split in ("train", "val")
    }
    classes = len(sets["train"].reader.class_to_idx)
    shared = {
        "input_size": (3, args.size, args.size),
        "batch_size": args.batch_size,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "num_workers": args.workers,
        "persistent_workers": False,
        "device": accelerator.device,
        # That of timm has a stream of CUDA's, and converts pictures on the GPU.
        "use_prefetcher": accelerator.device.type == "cuda",
        "pin_memory": accelerator.device.type == "cuda",
    }
    training = create_loader(
        sets["train"],
        is_training=True,
        scale=tuple(args.scale),
        auto_augment=args.auto_augment,
        re_prob=args.erasing,
        distributed=accelerator.num_processes > 1,
        **shared,
    )
    held_out = create_loader(sets["val"], crop_pct=args.crop, **shared)
    return training, held_out, classes
