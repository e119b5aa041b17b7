"""Measures how often the small Stable Diffusion draws what its captions say, with either attention.

    python examples/evaluate.py
    python examples/evaluate.py --attention softmax --pictures 100
    python examples/evaluate.py --reader-check

Softmax attention and LinFusion get the same captions, of scenes from seeds that training does not
use, and the same initial noise. `scene_reader` reads each picture and is held against its caption.
A table is printed; evaluation.json and a contact sheet for each size go to `--output`. Pictures are
kept under `--work` as they are made, and a command that was stopped goes on from them.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import time
from contextlib import nullcontext
from pathlib import Path

from models import TINY, load_linfusion, load_pipeline, require_device

try:
    import diffusers
    import torch
    import transformers
    from contact_sheet import contact_sheet
    from picture_store import PictureStore
    from reader_check import reader_check
    from scene_reader import read
    from scenes import Scene, caption, sample_scenes
    from scores import count_pairs, score, table
    from torch import Tensor
    from tqdm import tqdm

    import fbila
except ImportError as error:
    raise SystemExit(f"{error}. This example needs: pip install fbila[demo]") from error

SCENE_SEED = 4_100_000_000  # below 2**32, where torch's CPU generator starts to repeat itself
NOISE_SEED = 4_200_000_000  # of the first picture; the next has the next
ATTENTIONS = ("softmax", "linfusion")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ON_SHEET = 8


def held_out_scenes(n: int) -> tuple[list[Scene], list[str]]:
    """The first `n` scenes and captions of an endless row: picture 7 is the same for every `n`.

    Training has seen the captions of single objects all the same, as there are only 3528 that
    differ in more than wording; there are 80 million of three objects.
    """
    scenes = [
        scene
        for part in range(math.ceil(n / 1000))
        for scene in sample_scenes(1000, SCENE_SEED + part).describe()
    ][:n]
    rng = random.Random(SCENE_SEED)
    return scenes, [caption(scene, rng) for scene in scenes]


def generate(
    pipeline, args: argparse.Namespace, name: str, size: int, store: PictureStore
) -> Tensor:
    """Makes the pictures that the store does not have yet; returns all, `(n, 3, size, size)`."""
    _, captions = held_out_scenes(args.pictures)
    missing = [i for i in range(args.pictures) if i not in store.pictures]

    def run(indices: list[int], steps: int) -> Tensor:
        return pipeline(
            [captions[i] for i in indices],
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=args.guidance,
            # One for each picture and on the CPU, so that neither batches nor devices matter.
            generator=[torch.Generator().manual_seed(NOISE_SEED + i) for i in indices],
            output_type="pt",
        ).images.float()

    if missing:
        run(missing[: args.batch_size], 1)  # kernels are compiled and chosen outside the timing
    with tqdm(
        desc=name, total=args.pictures, initial=args.pictures - len(missing), unit="picture"
    ) as bar:
        for start in range(0, len(missing), args.batch_size):
            indices = missing[start : start + args.batch_size]
            began = time.perf_counter()
            pictures = run(indices, args.steps).cpu()
            seconds = time.perf_counter() - began
            if not pictures.isfinite().all():
                raise SystemExit(f"{name}: not all pixels are finite in {args.dtype}; try fp32")
            store.save(indices, pictures.mul(255).round().byte(), seconds)
            bar.update(len(indices))
    return torch.stack([store.pictures[i] for i in range(args.pictures)])


def fingerprint(folder: Path, without: Path | None = None) -> str:
    """A hash of the weights and settings in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in {".safetensors", ".bin", ".json", ".txt"} and without not in file.parents:
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def evaluate(args: argparse.Namespace) -> dict:
    """Draws and scores everything, writes the sheets, and returns the report."""
    pipeline = load_pipeline(str(args.model), DTYPES[args.dtype])
    # Before anything is drawn: weights that do not fit are found out at once.
    linfusion = None
    if "linfusion" in args.attention:
        linfusion = load_linfusion(pipeline, str(args.linfusion))
    pipeline.to(args.device)
    pipeline.set_progress_bar_config(disable=True)

    packages = (torch, diffusers, transformers, fbila)
    versions = {"python": platform.python_version()}
    versions |= {package.__name__: package.__version__ for package in packages}
    settings = {
        "model_sha256": fingerprint(args.model, without=args.model / "linfusion"),
        "steps": args.steps,
        "guidance": args.guidance,
        "dtype": args.dtype,
        "device": device_name(args.device),
        "scene_seed": SCENE_SEED,
        "noise_seed": NOISE_SEED,
        "versions": versions,
    }
    weights = {"linfusion_sha256": fingerprint(args.linfusion)} if linfusion else {}
    scenes, captions = held_out_scenes(args.pictures)
    rows, firsts = [], {size: {} for size in args.sizes}
    for attention in args.attention:
        own = settings | (weights if attention == "linfusion" else {})
        with linfusion.disabled() if linfusion and attention == "softmax" else nullcontext():
            for size in args.sizes:
                name = f"{attention}_{size}"
                store = PictureStore(args.work, name, own)
                pictures = generate(pipeline, args, name, size, store)
                firsts[size][attention] = pictures[:ON_SHEET]
                chunks = (chunk.to(args.device) / 255 for chunk in pictures.split(128))
                scores = score([reading for chunk in chunks for reading in read(chunk)], scenes)
                seconds = round(sum(store.seconds[i] for i in range(args.pictures)), 3)
                rows.append({"attention": attention, "size": size, "seconds": seconds} | scores)

    for size, drawn in firsts.items():
        contact_sheet(drawn, captions[:ON_SHEET]).save(args.output / f"sheet_{size}.png")
    chosen = {"pictures": args.pictures, "batch_size": args.batch_size}
    return {"settings": settings | weights | chosen, "rows": rows, "pairs": count_pairs(rows)}


def check_reader(args: argparse.Namespace) -> dict:
    """Scores the reader alone and returns the report."""
    settings = {"pictures": args.pictures, "device": device_name(args.device)}
    return {"settings": settings, "rows": reader_check(args.pictures, args.sizes, args.device)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=TINY, help="folder of the pipeline (examples/tiny_sd)")
    add("--linfusion", type=Path, help="folder of the weights (MODEL/linfusion)")
    add("--attention", choices=(*ATTENTIONS, "both"), default="both", help="%(default)s")
    add("--sizes", type=int, nargs="+", default=[128, 256], help="sides in pixels (128 256)")
    add("--pictures", type=int, default=1000, help="for each attention and size (%(default)s)")
    add("--batch-size", type=int, default=50, help="%(default)s")
    add("--steps", type=int, default=25, help="%(default)s")
    add("--guidance", type=float, default=5.0, help="guidance scale (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=tuple(DTYPES), help="(fp16 on a GPU, else fp32)")
    add("--output", type=Path, default=Path("outputs/evaluation"), help="folder (%(default)s)")
    add("--work", type=Path, help="folder for the pictures (OUTPUT/pictures)")
    add("--reader-check", action="store_true", help="measure the reader alone, without a model")
    args = parser.parse_args(arguments)
    for name in ("pictures", "batch_size", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {vars(args)[name]}")
    if any(size < 8 or size % 8 for size in args.sizes):
        parser.error(f"--sizes must be multiples of 8, got {' '.join(map(str, args.sizes))}")
    args.sizes = list(dict.fromkeys(args.sizes))
    args.attention = ATTENTIONS if args.attention == "both" else (args.attention,)
    args.linfusion = args.linfusion or args.model / "linfusion"
    args.work = args.work or args.output / "pictures"
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "fp16")
    require_device(args.device)
    if not args.reader_check:
        if not (args.model / "model_index.json").is_file():
            raise SystemExit(f"--model {args.model} is no folder of a diffusers pipeline.")
        if "linfusion" in args.attention and not (args.linfusion / "config.json").is_file():
            raise SystemExit(
                f"No LinFusion weights in {args.linfusion}: give --linfusion their folder, or "
                "leave them out with --attention softmax."
            )
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.reader_check:
        report, file = check_reader(args), args.output / "reader_check.json"
        print("\n" + table(report["rows"], {"pictures": "pictures", "size": "size"}))
    else:
        report, file = evaluate(args), args.output / "evaluation.json"
        print("\n" + table(report["rows"], {"attention": "attention", "size": "size"}) + "\n")
        for pair in report["pairs"]:
            print(
                f"{pair['size']}: all right with both {pair['both']}, with softmax alone "
                f"{pair['softmax_only']}, with LinFusion alone {pair['linfusion_only']}"
            )
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {file}")


if __name__ == "__main__":
    main()
