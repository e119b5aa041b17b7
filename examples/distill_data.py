"""Pictures with captions for `distill.py`, encoded by the pipeline that is distilled.

A source draws `n` pictures of one size, the same for the same seed: rendered scenes, or crops from
a folder. A `Pool` encodes many of them once, which pays where encoding costs more than training.
"""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from scenes import caption, render, sample_scenes
from torch import Tensor
from tqdm import tqdm

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


class SceneSource:
    """Rendered scenes, see `scenes.py`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, n: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """`n` pictures `(n, 3, size, size)` in [0, 1], and their captions."""
        scenes, rng = sample_scenes(n, seed), random.Random(seed)
        captions = [caption(scene, rng) for scene in scenes.describe()]
        return render(scenes, size, self.device), captions


class FolderSource:
    """Pictures of a folder with captions in metadata.jsonl (`file_name`, `text`) or .txt files.

    Each picture is scaled so that its shorter side is `size`, and its centre is cut out.
    """

    def __init__(self, folder: Path) -> None:
        metadata = folder / "metadata.jsonl"
        if metadata.is_file():
            rows = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
            self.items = [(folder / row["file_name"], row["text"]) for row in rows]
        else:
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
            captions = [file.with_suffix(".txt") for file in files]
            self.items = [
                (file, text.read_text().strip())
                for file, text in zip(files, captions, strict=True)
                if text.is_file()
            ]
        if not self.items:
            raise SystemExit(
                f"{folder} holds no pictures with captions: expected metadata.jsonl with file_name "
                "and text, or a .txt file beside each picture."
            )
        self.readers = ThreadPoolExecutor(8)

    def __call__(self, n: int, size: int, seed: int) -> tuple[Tensor, list[str]]:
        """`n` pictures `(n, 3, size, size)` in [0, 1], and their captions."""
        chosen = random.Random(seed).choices(self.items, k=n)
        pictures = list(self.readers.map(lambda item: self._read(item[0], size), chosen))
        return torch.stack(pictures), [text for _, text in chosen]

    @staticmethod
    def _read(file: Path, size: int) -> Tensor:
        with Image.open(file) as image:
            picture = image.convert("RGB")
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        picture = picture.crop((left, top, left + size, top + size))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return pixels.view(size, size, 3).permute(2, 0, 1) / 255


class Encoder:
    """Turns pictures and captions into what the UNet is trained on, with the pipeline's parts.

    A batch is a dict: `latents` `(n, c, h, w)`, `text` `(n, tokens, width)` and, for Stable
    Diffusion XL, `pooled` `(n, width)` and `time_ids` `(n, 6)`.
    """

    def __init__(self, pipeline, device: torch.device, dtype: torch.dtype) -> None:
        self.pipeline, self.device, self.dtype = pipeline, device, dtype
        self.blank = self.captions([""])
        if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
            self.blank = {name: torch.zeros_like(t) for name, t in self.blank.items()}

    @torch.no_grad()
    def __call__(self, pictures: Tensor, captions: list[str]) -> dict[str, Tensor]:
        vae = self.pipeline.vae
        pictures = pictures.to(self.device) * 2 - 1
        # In float16 some autoencoders overflow.
        low = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
            latents = vae.encode(pictures).latent_dist.sample() - (vae.config.shift_factor or 0)
        batch = {"latents": latents * vae.config.scaling_factor, **self.captions(captions)}
        batch = {name: tensor.to(self.dtype) for name, tensor in batch.items()}
        if "pooled" in batch:
            # Original size, corner of the crop, target size: pictures arrive at their target size.
            height, width = pictures.shape[-2:]
            ids = torch.tensor([height, width, 0, 0, height, width], device=self.device)
            batch["time_ids"] = ids.expand(len(captions), 6)
        return batch

    @torch.no_grad()
    def captions(self, captions: list[str]) -> dict[str, Tensor]:
        """The captions' embeddings, as the pipeline's UNet is given them."""
        text, _, *pooled = self.pipeline.encode_prompt(
            captions,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"text": text, "pooled": pooled[0]} if pooled else {"text": text}


class Stream:
    """Encodes a new batch for every step, the next one's pictures being read meanwhile."""

    def __init__(self, source, encoder: Encoder, sizes: "Sizes", seed: int) -> None:
        self.source, self.encoder, self.sizes, self.seed = source, encoder, sizes, seed

    def batches(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        def draw(step: int) -> tuple[Tensor, list[str]]:
            size = self.sizes.at(step)
            return self.source(self.sizes.batch(size), size, seed=self.seed + step)

        with ThreadPoolExecutor(1) as reader:
            following, step = reader.submit(draw, first_step), first_step
            while True:
                step += 1
                now, following = following, reader.submit(draw, step)
                yield self.encoder(*now.result())


class Pool:
    """Encodes `n` pictures of the smallest size up front (fewer of larger ones), then draws."""

    def __init__(self, source, encoder: Encoder, sizes: "Sizes", seed: int, n: int) -> None:
        self.sizes = sizes
        self.encoded = {}
        for size in sizes.sizes:
            chunk = max(1, 2**23 // size**2)
            count = max(1, n * min(sizes.sizes) ** 2 // size**2)
            parts = [
                encoder(*source(min(chunk, count - start), size, seed + start))
                for start in tqdm(range(0, count, chunk), desc=f"encoding at {size}", mininterval=5)
            ]
            self.encoded[size] = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def batches(self, first_step: int) -> Iterator[dict[str, Tensor]]:
        step = first_step
        while True:
            size = self.sizes.at(step)
            encoded = self.encoded[size]
            device = encoded["latents"].device
            pick = torch.randint(len(encoded["latents"]), (self.sizes.batch(size),), device=device)
            yield {name: tensor[pick] for name, tensor in encoded.items()}
            step += 1


class Sizes:
    """Which picture size each step has, the same in every process, and how many pictures.

    Args:
        sizes: Sides in pixels.
        weights: Shares of the steps.
        batch: Pictures a step at the smallest size; larger ones get as many pixels.
    """

    def __init__(self, sizes: list[int], weights: list[float], batch: int, seed: int) -> None:
        self.sizes, self.weights, self._batch, self.seed = sizes, weights, batch, seed

    def at(self, step: int) -> int:
        return random.Random(f"{self.seed} {step}").choices(self.sizes, self.weights)[0]

    def batch(self, size: int) -> int:
        return max(1, self._batch * min(self.sizes) ** 2 // size**2)
