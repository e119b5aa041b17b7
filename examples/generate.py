"""Generates pictures with LinFusion, and the same ones with softmax attention beside them.

    python examples/generate.py
    python examples/generate.py --model stabilityai/stable-diffusion-xl-base-1.0 --compare \
        --prompt "a lighthouse in a storm" --height 2048 --width 2048

Without arguments it uses the small Stable Diffusion that comes with the examples. Other models of
the families 1.5, 2.1 and XL are fetched from the Hub, and so are LinFusion weights for them.
"""

import argparse
import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from models import TINY, load_linfusion, load_pipeline, require_device

try:
    import psutil
    from contact_sheet import wrap
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    raise SystemExit(f"{error}. This example needs: pip install fbila[demo]") from error

TINY_PROMPTS = [
    "a yellow star at the top and a red heart at the bottom on a blue background",
    "a white ring in the center, a green background",
    "an orange background with a purple cross on the left and a blue square on the right",
    "a pink triangle in the top left, a red circle in the bottom right, a yellow background",
]
PROMPTS = [
    "a lighthouse on a cliff in a storm, oil painting",
    "a photograph of a fox in a snowy forest, morning light",
]
CELL = 256  # pixels of a picture's longer side in the grid


@dataclass
class Run:
    """What one way of computing attention gave.

    Attributes:
        pictures: One a prompt.
        seconds: Of a denoising step for all the prompts together, the median.
        memory: Peak in bytes, above what was in use before: activations, not weights.
    """

    pictures: list[Image.Image]
    seconds: float
    memory: int


class PeakMemory:
    """Peak memory of a block of code above what is in use at its start.

    On CUDA it is what PyTorch allocated. Elsewhere it is the process's resident memory, looked at
    every two milliseconds after the allocator has given back what it kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            yield
            self.bytes = torch.cuda.max_memory_allocated(self.device) - before
            return
        return_free_memory()
        process, done = psutil.Process(), threading.Event()
        before = peak = process.memory_info().rss

        def look() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, process.memory_info().rss)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.bytes = peak - before


def return_free_memory() -> None:
    """Makes glibc give freed memory back, which would hide what the next run needs."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another C library


def generate(pipeline, args: argparse.Namespace, name: str) -> Run:
    """Generates a picture for every prompt, after an unmeasured step that warms everything up."""
    device = torch.device(args.device)
    ends = []

    def step_ended(_pipeline, _step, _timestep, values: dict) -> dict:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        return values

    def run(steps: int) -> list[Image.Image]:
        return pipeline(
            args.prompt,
            height=args.height,
            width=args.width,
            num_inference_steps=steps,
            guidance_scale=args.guidance,
            # On the CPU, so that a seed means the same pictures everywhere.
            generator=[
                torch.Generator().manual_seed(args.seed + i) for i in range(len(args.prompt))
            ],
            callback_on_step_end=step_ended,
        ).images

    pipeline.set_progress_bar_config(desc=f"{name}, warm-up", leave=False)
    run(1)
    ends.clear()
    pipeline.set_progress_bar_config(desc=name, leave=True)
    peak = PeakMemory(device)
    with peak.watch():
        pictures = run(args.steps)
    # The first step's start is not seen, so its time is left out. The median of the others says
    # what a step takes on a machine that now and then has something else to do.
    seconds = median(after - before for before, after in pairwise(ends))
    return Run(pictures, seconds, peak.bytes)


def grid(runs: dict[str, Run], prompts: list[str]) -> Image.Image:
    """A picture of all pictures: a row for each run, a column with its caption for each prompt."""
    font = ImageFont.load_default(14)
    width, height = next(iter(runs.values())).pictures[0].size
    scale = CELL / max(width, height)
    width, height = round(width * scale), round(height * scale)
    captions = [wrap(prompt, font, width) for prompt in prompts]
    left, gap = 70, 6
    top = 18 * max(len(lines) for lines in captions) + 2 * gap
    size = (left + len(prompts) * (width + gap), top + len(runs) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(captions):
        draw.multiline_text(
            (left + column * (width + gap), gap), "\n".join(lines), "black", font, spacing=4
        )
    for row, (name, run) in enumerate(runs.items()):
        y = top + row * (height + gap)
        draw.text((gap, y + height // 2), name, "black", font)
        for column, picture in enumerate(run.pictures):
            cell = picture.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (left + column * (width + gap), y))
    return sheet


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder or Hub id (the small model)")
    add("--linfusion", help='folder or Hub id of the weights, "none" for softmax (found by itself)')
    add("--prompt", action="append", help="may be given several times")
    add("--height", type=int, help="pixels (the model's own)")
    add("--width", type=int, help="pixels (the model's own)")
    add("--steps", type=int, default=20, help="at least 2 (%(default)s)")
    add("--guidance", type=float, default=5.0, help="guidance scale (%(default)s)")
    add("--seed", type=int, default=0, help="of the first picture; the next has the next")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(float16 on a GPU)")
    compare = "softmax and linear attention side by side (on for the small model)"
    add("--compare", action=argparse.BooleanOptionalAction, help=compare)
    add("--output", type=Path, default=Path("outputs/generate"), help="folder (%(default)s)")
    args = parser.parse_args(arguments)
    tiny = Path(args.model).resolve() == TINY.resolve()
    if args.compare is None:
        args.compare = tiny and args.linfusion != "none"
    if args.compare and args.linfusion == "none":
        parser.error("--compare needs LinFusion, which --linfusion none leaves out")
    if args.steps < 2:
        parser.error(f"--steps must be at least 2 to measure a step, got {args.steps}")
    args.prompt = args.prompt or (TINY_PROMPTS if tiny else PROMPTS)
    require_device(args.device)
    on_cpu = torch.device(args.device).type == "cpu"
    args.dtype = getattr(torch, args.dtype or ("float32" if on_cpu else "float16"))
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    pipeline = load_pipeline(args.model, args.dtype)
    native = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    args.height, args.width = args.height or native, args.width or native
    multiple = max(8, pipeline.vae_scale_factor)
    if args.height % multiple or args.width % multiple or min(args.height, args.width) <= 0:
        raise SystemExit(
            f"--height and --width must be multiples of {multiple}, "
            f"got {args.height} and {args.width}"
        )
    linfusion = None if args.linfusion == "none" else load_linfusion(pipeline, args.linfusion)
    pipeline.to(args.device)

    runs = {}
    if linfusion is None or args.compare:
        with linfusion.disabled() if linfusion else nullcontext():
            runs["softmax"] = generate(pipeline, args, "softmax")
    if linfusion is not None:
        runs["linear"] = generate(pipeline, args, "linear")

    args.output.mkdir(parents=True, exist_ok=True)
    for name, run in runs.items():
        for i, picture in enumerate(run.pictures):
            picture.save(args.output / f"{name}_{i}.png")
    grid(runs, args.prompt).save(args.output / "grid.png")

    print(
        f"\n{len(args.prompt)} pictures of {args.width} x {args.height}, {args.steps} steps, seed "
        f"{args.seed}, on {args.device} in {str(args.dtype).removeprefix('torch.')}\n"
    )
    print(f"{'attention':<11}{'s/step':>8}{'memory *':>12}   pictures")
    for name, run in runs.items():
        files = args.output / f"{name}_*.png"
        print(f"{name:<11}{run.seconds:>8.3f}{run.memory / 2**20:>8.0f} MiB   {files}")
    print(f"\n* peak above the loaded models. All pictures: {args.output / 'grid.png'}")


if __name__ == "__main__":
    main()
