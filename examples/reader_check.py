"""Measures `scene_reader` alone, on rendered pictures whose content is known.

What the reader cannot read in these, it cannot be trusted to find missing in generated ones; and
what it finds right under another picture's caption, it would find right by chance.
"""

import torch
import torch.nn.functional as F
from scene_reader import Reading, rates, read
from scenes import Scene, render, sample_scenes
from torch import Tensor
from tqdm import tqdm

SEED = 4_150_000_000
NOISE = 0.04  # standard deviation, of a range of 1
BLUR = 1 / 128  # standard deviation, as a share of the side


def reader_check(n: int, sizes: list[int], device: str) -> list[dict]:
    """Shares of `n` pictures that are read right: a dict for each size and kind of picture."""
    scenes = sample_scenes(n, SEED)
    described = scenes.describe()
    rows = []
    for size in sizes:
        readings: dict[str, list[Reading]] = {}
        for start in tqdm(range(0, n, 100), desc=f"reading at {size}", leave=False):
            clean = render(scenes[start : start + 100], size, device)
            for kind, pictures in variants(clean, seed=SEED + start).items():
                readings.setdefault(kind, []).extend(read(pictures))
        truths: dict[str, list[Scene]] = dict.fromkeys(readings, described)
        readings["of another caption"] = readings["clean"]
        truths["of another caption"] = described[1:] + described[:1]
        for kind, found in readings.items():
            rows.append({"size": size, "pictures": kind, "rates": rates(found, truths[kind])})
    return rows


def variants(clean: Tensor, seed: int) -> dict[str, Tensor]:
    """Clean `(n, 3, size, size)` pictures, and the same ones made harder to read."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    noisy = (clean + NOISE * noise).clamp(0, 1)
    blurred = blur(clean)
    return {
        "clean": clean,
        "8-bit": to_8_bit(clean),
        "blurred": blurred,
        "noisy": noisy,
        "blurred, noisy, 8-bit": to_8_bit((blurred + NOISE * noise).clamp(0, 1)),
    }


def to_8_bit(pictures: Tensor) -> Tensor:
    return pictures.mul(255).round() / 255


def blur(pictures: Tensor) -> Tensor:
    """With a Gaussian of standard deviation `BLUR`."""
    deviation = BLUR * pictures.shape[-1]
    reach = round(4 * deviation)
    axis = torch.arange(-reach, reach + 1, device=pictures.device)
    weights = torch.exp(-(axis**2) / (2 * deviation**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pictures, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, weights, groups=3), weights.mT, groups=3)
