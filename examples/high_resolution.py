"""Draws a picture of any size with LinFusion: at the model's own size first, then ever larger.

    python examples/high_resolution.py "a red circle on the left and a blue square on the right \
        on a yellow background" --size 1024
    python examples/high_resolution.py "a lighthouse on a cliff in a storm, oil painting" \
        --model stabilityai/stable-diffusion-xl-base-1.0 --size 8192x4096 --output outputs/storm

No model draws well at many times the size it was trained at: it repeats objects, since each part
of a large picture looks to it like a whole one. So the first stage draws a picture of the size
that the model knows, which decides what is where. Every other stage makes it twice as large, adds
some noise, and lets the model denoise that at the larger size (SDEdit): noise covers what is
small, and only that is drawn anew. LinFusion makes the time of a step grow with the pixels alone.

Every stage's picture goes to the output folder. Interrupted, the same command goes on from the
step it had come to, and gives the same picture. Without --model it uses the small Stable Diffusion
that comes with the examples; LinFusion weights for other models are fetched from the Hub.
"""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from models import TINY, first_line, load_linfusion, load_pipeline, require_device

try:
    from diffusers import AutoPipelineForImage2Image
    from large_vae import enable_large_pictures
    from PIL import Image
    from stage_folder import StageFolder
    from tqdm import tqdm

    from fbila.adapters import AdapterError, low_memory
except ImportError as error:
    raise SystemExit(f"{error}. This example needs: pip install fbila[demo]") from error

# Those of the LinFusion authors' own example, from 1024 x 512 to 16384 x 8192 pixels.
STRENGTHS = (0.4, 0.3, 0.2, 0.1)
# The small model saw no picture above 256 pixels, its second stage. Beyond, more noise than this
# frays edges and shadows; and told what to draw, it paints patches of one object's colour into
# another at any strength, since it looks for the whole scene in each part of the picture.
TINY_STRENGTHS = (0.24, 0.04)
TINY_DETAIL_PROMPT = ""
MULTIPLE = 8  # pixels to a latent's side, in the published autoencoders


class Stage(NamedTuple):
    """One picture on the way.

    Attributes:
        number: From 1.
        width, height: In pixels.
        strength: Where between the picture before (0) and pure noise (1) it starts; None for the
            first, which has none before it.
    """

    number: int
    width: int
    height: int
    strength: float | None


def plan(width: int, height: int, native: int, strengths: list[float]) -> list[Stage]:
    """The stages to a picture: of the model's own number of pixels, then doubled, then exact.

    Args:
        width, height: Of the last stage.
        native: Side of the square that the model was trained on.
        strengths: Of the second stage and so on; the last one repeats.
    """
    scale = math.sqrt(width * height) / native
    if scale <= 1:
        return [Stage(1, width, height, None)]
    first = [max(MULTIPLE, round(side / scale / MULTIPLE) * MULTIPLE) for side in (width, height)]
    # A little more than double is better than a stage for the few pixels that are left.
    doublings = max(1, math.ceil(math.log2(scale) - 0.1))
    sizes = [[side * 2**i for side in first] for i in range(doublings)] + [[width, height]]
    return [
        Stage(i + 1, *size, strengths[min(i, len(strengths)) - 1] if i else None)
        for i, size in enumerate(sizes)
    ]


def draw(pipelines: tuple, stage: Stage, before: Image.Image | None, args) -> Image.Image:
    """The picture of a stage, from that of the stage before."""
    from_text, from_picture = pipelines
    options = {
        "num_inference_steps": args.steps,
        # A generator for each stage, so that it does not matter which stages ran in this process;
        # on the CPU, so that a seed means the same picture everywhere.
        "generator": torch.Generator().manual_seed(args.seed + stage.number - 1),
    }
    bar = {"desc": f"{stage.width} x {stage.height}", "unit": "step", "leave": False, "position": 1}
    if before is None:
        from_text.set_progress_bar_config(**bar)
        size = {"width": stage.width, "height": stage.height}
        return from_text(args.prompt, guidance_scale=args.guidance, **size, **options).images[0]
    from_picture.set_progress_bar_config(**bar)
    prompt = args.prompt if stage.number == 2 else args.detail_prompt
    return from_picture(
        prompt,
        image=before.resize((stage.width, stage.height), Image.Resampling.LANCZOS),
        # At least one step; just 1 / steps may round to none.
        strength=max(stage.strength, 1.001 / args.steps),
        # Without a prompt there is nothing to guide to, and half of the work is saved.
        guidance_scale=args.guidance if prompt else 1.0,
        **options,
    ).images[0]


def size_of(text: str) -> tuple[int, int]:
    """Width and height from "1024" or "1536x1024"."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
        width, height = sides if len(sides) > 1 else sides * 2
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 1024 nor 1536x1024") from None
    if min(width, height) <= 0 or width % MULTIPLE or height % MULTIPLE:
        raise argparse.ArgumentTypeError(f"must be multiples of {MULTIPLE}, got {text}")
    return width, height


def strength_of(text: str) -> float:
    strength = float(text)
    if not 0 < strength <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return strength


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompt")
    size = f'pixels: "1024" or "1536x1024", multiples of {MULTIPLE} (%(default)s)'
    add("--size", type=size_of, default="1024", help=size)
    add("--model", default=str(TINY), help="folder or Hub id (the small model)")
    add("--linfusion", help="folder or Hub id of the weights (found by itself)")
    output = "folder of a single run, to go on from (%(default)s)"
    add("--output", type=Path, default=Path("outputs/high_resolution"), help=output)
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--steps", type=int, default=25, help="from pure noise; strength times these (%(default)s)")
    add("--guidance", type=float, default=5.0, help="guidance scale (%(default)s)")
    strength = (
        "how much each stage after the first draws anew, between 0 and 1; one for each, the last "
        f"repeats ({' '.join(map(str, STRENGTHS))}; {' '.join(map(str, TINY_STRENGTHS))} for the "
        "small model)"
    )
    add("--strength", type=strength_of, nargs="+", metavar="S", help=strength)
    detail = "prompt of the stages after the second (the prompt; nothing for the small model)"
    add("--detail-prompt", metavar="PROMPT", help=detail)
    tile = "pixels of the autoencoder's tiles, a multiple of 64 (its own size, at least 512)"
    add("--tile", type=int, help=tile)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="(float16 on a GPU)")
    memory = "slower, for sizes that would not fit the GPU's memory"
    add("--low-memory", action="store_true", help=memory)
    args = parser.parse_args(arguments)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.tile is not None and (args.tile < 64 or args.tile % 64):
        parser.error(f"--tile must be a multiple of 64, got {args.tile}")
    require_device(args.device)
    tiny = Path(args.model).resolve() == TINY.resolve()
    args.strength = args.strength or list(TINY_STRENGTHS if tiny else STRENGTHS)
    if args.detail_prompt is None:
        args.detail_prompt = TINY_DETAIL_PROMPT if tiny else args.prompt
    on_cpu = torch.device(args.device).type == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "float16")
    return args


def what_pictures_depend_on(args: argparse.Namespace) -> dict:
    """The arguments that make it another picture.

    The device and --low-memory are not among them: they change no more than the rounding, and a
    stage that did not fit may go on with them.
    """
    given = {k: v for k, v in vars(args).items() if k not in ("output", "device", "low_memory")}
    for name in ("model", "linfusion"):
        if given[name] and Path(given[name]).is_dir():
            given[name] = str(Path(given[name]).resolve())
    return {**given, "size": list(args.size)}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    folder = StageFolder(args.output, what_pictures_depend_on(args))
    picture = folder.picture()
    if folder.finished == folder.stages:
        print(f"It is drawn already: {folder.picture_file(folder.finished)}")
        return
    pipeline = load_pipeline(args.model, getattr(torch, args.dtype))
    linfusion = load_linfusion(pipeline, args.linfusion)
    pipeline.to(args.device)
    linfusion.fuse()
    if args.low_memory:
        try:
            low_memory(pipeline)
        except AdapterError as error:
            raise SystemExit(f"--low-memory: {first_line(error)}") from error
    enable_large_pictures(pipeline.vae, args.tile or max(512, pipeline.vae.config.sample_size))
    pipelines = pipeline, AutoPipelineForImage2Image.from_pipe(pipeline)

    native = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    stages = plan(*args.size, native, args.strength)
    folder.begin(len(stages))
    seconds = []
    with tqdm(total=len(stages), initial=folder.finished, desc="stages", unit="stage") as bar:
        for stage in stages[folder.finished :]:
            start = time.perf_counter()
            with folder.remember(pipeline.unet):
                picture = draw(pipelines, stage, picture, args)
            folder.finish(picture)
            seconds.append((stage, time.perf_counter() - start))
            bar.update()
    for stage, s in seconds:
        file = folder.picture_file(stage.number)
        print(f"{stage.width:>6} x {stage.height:<6}{s:>8.1f} s   {file}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command goes on from here.") from None
