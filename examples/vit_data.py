"""Labelled pictures for `train_vit.py`: a folder's, a small data set's, or drawn ones.

A folder's are read by timm's loader. The others stay in memory, on the device: they are small, and
a loader's workers would need longer for them than the GPU.

A loader goes over batches `x (b, 3, size, size)`, normalised, and `y (b,)`.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
import vit_drawn
from filelock import FileLock
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

# timm's names of torchvision's.
DATASETS = [f"torch/{name}" for name in ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures").add_argument
    add("--data", type=Path, help="folder with train/ and val/, or of --dataset (they are drawn)")
    add("--dataset", choices=DATASETS, help="a small data set, in --data")
    add("--download", action="store_true", help="fetch --dataset if it is not there")
    add("--size", type=int, default=64, help="side in pixels (%(default)s)")
    add("--hflip", type=float, default=0.5, help="share that is mirrored (%(default)s)")
    add("--shift", type=int, default=2, help="at most, in pixels (--dataset, %(default)s)")
    add("--pictures", type=int, default=24576, help="drawn for training (%(default)s)")
    add("--held-out", type=int, default=10000, help="drawn for evaluation (%(default)s)")
    add("--noise", type=float, default=0.1, help="in drawn pictures (%(default)s)")
    add("--workers", type=int, default=4, help="that read the folder (%(default)s)")
    add("--scale", type=float, nargs=2, default=[0.35, 1.0], help="of random crops (folder)")
    add("--crop", type=float, default=0.9, help="share of the centre that is evaluated (folder)")
    add("--auto-augment", help="timm's name of a policy (folder)")
    add("--erasing", type=float, default=0.0, help="probability of random erasing (folder)")


def loaders(args: argparse.Namespace, accelerator):
    """Loaders for training and held-out pictures, and the number of classes."""
    if args.dataset:
        return dataset_loaders(args, accelerator)
    return folder_loaders(args, accelerator) if args.data else drawn_loaders(args, accelerator)


class InMemory:
    """Pictures in memory, in a new order, mirrored and shifted at random in each round of training.

    Args:
        pictures: `(n, 3, size, size)` uint8.
        labels: `(n,)`.
        batch_size: Pictures a batch; in training a smaller last one is left out.
        training: Whether to shuffle, mirror and shift, by torch's global random numbers.
        hflip, vflip: Shares of pictures that are mirrored left to right, and upside down.
        shift: How many pixels they are moved at most, each way; what comes in is black.
        rank, world: This process, of how many; each has its share of each round.
    """

    def __init__(
        self, pictures: Tensor, labels: Tensor, batch_size: int, *, training: bool,
        hflip: float = 0.0, vflip: float = 0.0, shift: int = 0, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.pictures, self.labels, self.batch_size = pictures, labels, batch_size
        self.training, self.rank, self.world = training, rank, world
        self.hflip, self.vflip, self.shift = hflip, vflip, shift

    def __len__(self) -> int:
        share = len(self.labels) // self.world
        return share // self.batch_size if self.training else -(-share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.labels)
        order = torch.randperm(n) if self.training else torch.arange(n)
        share = order[self.rank :: self.world][: n // self.world]
        # From the CPU's random numbers, which are the same on all machines; for all batches at
        # once, since each copy to a GPU waits for it.
        plan = torch.stack([share, *(self.draw_moves(len(share)) if self.training else ())])
        for chosen, *moves in plan.to(self.labels.device).split(self.batch_size, 1)[: len(self)]:
            x = self.pictures[chosen]
            if moves:
                x = self.move(x, *moves)
            yield x.float().div_(127.5).sub_(1), self.labels[chosen]

    def draw_moves(self, n: int) -> list[Tensor]:
        """For `move`, each `(n,)`."""
        flips = [(torch.rand(n) < share).long() for share in (self.hflip, self.vflip)]
        return flips + [torch.randint(2 * self.shift + 1, (n,)) for _ in range(2)]

    def move(self, x: Tensor, across: Tensor, over: Tensor, top: Tensor, left: Tensor) -> Tensor:
        for share, flip, side in ((self.hflip, across, 3), (self.vflip, over, 2)):
            if share:
                x = torch.where(flip.bool().view(-1, 1, 1, 1), x.flip(side), x)
        if self.shift:
            height, width = x.shape[2:]
            windows = pad(x, [self.shift] * 4).unfold(2, height, 1).unfold(3, width, 1)
            x = windows[torch.arange(len(x), device=x.device), :, top, left]
        return x


def in_memory(args, accelerator, training, held_out, **options) -> tuple[InMemory, InMemory]:
    rank, world = accelerator.process_index, accelerator.num_processes
    return (
        InMemory(*training, args.batch_size, training=True, rank=rank, world=world, **options),
        # Every process looks at all of them, since they are few, and at more at a time: there are
        # no gradients.
        InMemory(*held_out, 4 * args.batch_size, training=False),
    )


def drawn_loaders(args, accelerator) -> tuple[InMemory, InMemory, int]:
    training, held_out = (
        vit_drawn.draw(n, args.size, seed, args.noise, accelerator.device)
        for n, seed in ((args.pictures, 0), (args.held_out, vit_drawn.HELD_OUT))
    )
    flips = {"hflip": args.hflip, "vflip": args.hflip}
    return *in_memory(args, accelerator, training, held_out, **flips), vit_drawn.CLASSES


@cache
def decode(
    name: str, root: Path, split: str, download: bool, size: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Pictures in uint8, labels and the number of classes; kept for the next call."""
    if download:
        root.mkdir(parents=True, exist_ok=True)
    try:
        # The first process fetches it, others wait.
        with FileLock(root / "download.lock") if download else nullcontext():
            pictures = create_dataset(name, root=str(root), split=split, download=download)
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"{name} is not in {root} ({error}); --download fetches it.") from error
    x = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture, _ in pictures]))
    # Resized on the device; in parts, since it works in floats.
    parts = x.to(device).permute(0, 3, 1, 2).split(2048)
    x = torch.cat([resize(part, [size, size], InterpolationMode.BICUBIC) for part in parts])
    return x.contiguous(), torch.as_tensor(pictures.targets).to(device), len(pictures.classes)


def dataset_loaders(args, accelerator) -> tuple[InMemory, InMemory, int]:
    if not args.data:
        raise SystemExit("--dataset needs --data, the folder where it is.")
    (*training, classes), (*held_out, _) = (
        decode(args.dataset, args.data, split, args.download, args.size, accelerator.device)
        for split in ("train", "val")
    )
    moves = {"hflip": args.hflip, "shift": args.shift}
    return *in_memory(args, accelerator, training, held_out, **moves), classes


def folder_loaders(args, accelerator):
    """For a folder with a folder of pictures for each class in `train` and `val`."""
    splits = "train", "val"
    if not all((args.data / split).is_dir() for split in splits):
        raise SystemExit(f"{args.data} has no folders train and val.")
    sets = {
        split: create_dataset("", root=str(args.data), split=split, is_training=split == "train")
        for split in splits
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
        hflip=args.hflip,
        auto_augment=args.auto_augment,
        re_prob=args.erasing,
        distributed=accelerator.num_processes > 1,
        **shared,
    )
    held_out = create_loader(sets["val"], crop_pct=args.crop, **shared)
    return training, held_out, classes
