"""Distils LinFusion from a diffusers pipeline: linear attention learns from its softmax attention.

    python examples/distill.py --model examples/tiny_sd --minutes 5 --pool 60000
    accelerate launch examples/distill.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --data pictures/ --resolutions 512 --batch-size 8 --gradient-checkpointing --resume

Teacher and student are one UNet: the teacher is the UNet without LinFusion. With the noise (or
velocity) that the scheduler asks for as `target`, the loss is

    MSE(student, target) + 0.5 MSE(student, teacher) + 0.5 mean over layers of MSE(attn1 outputs)

Only LinFusion's parameters train. They end up in `--output`; losses and a checkpoint to resume
from in `--work`. A run ends after `--steps` or `--minutes`, whichever comes first, and its learning
rate follows the larger of the two fractions.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from distill_data import Encoder, FolderSource, Pool, SceneSource, Sizes, Stream
from distill_loss import Distillation, noised
from graphed import Graphed
from models import TINY, LinFusion, load_pipeline
from torch import Tensor, nn
from tqdm import tqdm

try:
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, DistributedType, broadcast, set_seed
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    from fbila.adapters import fused_blocks
except ImportError as error:
    raise SystemExit(f"{error}. This example needs: pip install fbila[train]") from error


class Clock:
    """How far a run has come, over all its sessions."""

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps, self.minutes = steps, minutes
        self.step, self.seconds, self.since = 0, 0.0, time.monotonic()

    def tick(self) -> None:
        """Counts a step and the time since the last one."""
        now = time.monotonic()
        self.seconds += now - self.since
        self.step, self.since = self.step + 1, now

    def fraction(self) -> float:
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0
        return max(self.step / self.steps, by_time)

    def state_dict(self) -> dict:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.seconds = state["step"], state["seconds"]


def learning_rate(clock: Clock, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    rise = min(1.0, (clock.step + 1) / warmup)
    return peak * rise * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, clock.fraction()))) / 2)


def keep_only_linfusion(accelerator: Accelerator, linfusion: LinFusion) -> None:
    """Makes accelerate's checkpoints hold LinFusion's weights and not the frozen UNet's."""

    def save(models: list, weights: list, folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            linfusion.save_pretrained(Path(folder) / "linfusion")

    def load(models: list, folder: str) -> None:
        models.clear()
        saved = LinFusion.from_pretrained(Path(folder) / "linfusion")
        linfusion.load_state_dict(saved.state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Replaces the checkpoint; being stopped on the way leaves the one before."""
    part = folder.with_suffix(".part")
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)


def train(accelerator: Accelerator, args: argparse.Namespace) -> None:
    device = accelerator.device
    args.work.mkdir(parents=True, exist_ok=True)
    # One process fetches a model that all of them then find on the disk.
    with accelerator.main_process_first():
        pipeline = load_pipeline(args.model)
    unet, vae = pipeline.unet, pipeline.vae
    if unet.config.in_channels != vae.config.latent_channels:
        raise SystemExit(f"{args.model} takes more than noise and text; distil its base model.")
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.to(device)
    for module in pipeline.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    linfusion = LinFusion.construct_for(
        unet=unet,
        load_pretrained=args.start_from is not None,
        pretrained_model_name_or_path=args.start_from,
        mid_dim_scale=None if args.start_from else args.mid_dim_scale,
    )
    linfusion.requires_grad_(True)
    if device.type == "cuda":
        # Teacher and student alike: what is frozen around attention, by fewer kernels.
        fused_blocks(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
    parameters = list(linfusion.parameters())
    accelerator.print(
        f"{len(linfusion.layers)} layers, {sum(p.numel() for p in parameters) / 1e6:.2f}M "
        f"parameters to train, on {device}"
    )
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.lr,
        betas=(0.9, 0.99),
        weight_decay=args.weight_decay,
        fused=device.type == "cuda",
    )
    distillation = Distillation(unet, linfusion, args.compile)
    distillation, optimizer = accelerator.prepare(distillation, optimizer)
    ema = EMAModel(parameters, decay=args.ema, foreach=True) if args.ema else None
    clock = Clock(args.steps, args.minutes)
    accelerator.register_for_checkpointing(clock, *([ema] if ema else []))
    keep_only_linfusion(accelerator, linfusion)
    checkpoint = args.work / "checkpoint"
    if args.resume and checkpoint.is_dir():
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"resumed after step {clock.step}, {clock.seconds / 60:.1f} minutes")
    if ema:
        ema.to(device)

    def differentiate(**example) -> dict[str, Tensor]:
        losses = distillation(**example)
        accelerator.backward(losses["total"])
        return {name: loss.detach() for name, loss in losses.items()}

    if args.cuda_graph:
        differentiate = Graphed(differentiate, parameters)

    encoded = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
        accelerator.mixed_precision, torch.float32
    )
    encoder = Encoder(pipeline, device, encoded)
    source = SceneSource(device) if args.data == "scenes" else FolderSource(Path(args.data))
    resolutions = args.resolutions or [unet.config.sample_size * pipeline.vae_scale_factor]
    weights = args.resolution_weights or [1.0] * len(resolutions)
    sizes = Sizes(resolutions, weights, args.batch_size, args.seed)
    # Every process, and every session of a pool, draws pictures of its own.
    seed = 10**15 * (1 + args.seed) + 10**12 * accelerator.process_index
    if args.pool:
        data = Pool(source, encoder, sizes, seed + 10**6 * clock.step, args.pool)
    else:
        data = Stream(source, encoder, sizes, seed)
    batches = data.batches(clock.step * args.accumulate)

    bar = tqdm(
        total=args.steps,
        initial=clock.step,
        desc="distilling",
        mininterval=2,
        disable=not accelerator.is_main_process,
    )
    sums: dict[str, Tensor] = {}
    count, saved = 0, time.monotonic()
    clock.since = time.monotonic()
    while clock.fraction() < 1:
        rate = learning_rate(clock, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(args.accumulate):
            with accelerator.accumulate(distillation):
                example = noised(next(batches), encoder.blank, scheduler, args.drop_captions)
                losses = differentiate(**example)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=not args.cuda_graph)
            # Summed on the device: reading a loss at every step would stall it.
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss
            count += 1
        if ema:
            ema.step(parameters)
        clock.tick()
        if accelerator.num_processes > 1:
            # Processes must stop together, so the first one's clock counts.
            clock.seconds = broadcast(torch.tensor(clock.seconds, device=device)).item()
        bar.update()
        if clock.step % args.log_every == 0:
            means = {name: accelerator.reduce(s / count, "mean").item() for name, s in sums.items()}
            sums, count = {}, 0
            if accelerator.is_main_process:
                log(
                    args.work / "log.jsonl",
                    step=clock.step,
                    seconds=clock.seconds,
                    **means,
                    lr=rate,
                )
            bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()}, refresh=False)
            if not math.isfinite(means["total"]):
                raise SystemExit(f"the loss is {means['total']} at step {clock.step}; lower --lr")
        if time.monotonic() - saved > 60 * args.save_minutes:
            save_checkpoint(accelerator, checkpoint)
            saved = time.monotonic()
    bar.close()
    save_checkpoint(accelerator, checkpoint)
    if accelerator.is_main_process:
        if ema:
            ema.copy_to(parameters)
        linfusion.unmount()
        for layer in linfusion.layers:
            layer.to(torch.float16 if args.half else torch.float32)
        linfusion.save_pretrained(args.output)
        print(f"{clock.step} steps in {clock.seconds / 60:.1f} minutes; weights in {args.output}")


def log(file: Path, **entry) -> None:
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in entry.items()}
    with file.open("a") as lines:
        lines.write(json.dumps(rounded) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder or Hub id of the pipeline (%(default)s)")
    add("--output", type=Path, help="for the weights (MODEL/linfusion, or outputs/linfusion)")
    add("--work", type=Path, default=Path("outputs/distill"), help="log, checkpoint (%(default)s)")
    add("--data", help='"scenes" (the tiny model\'s), or a folder of pictures with captions')
    add("--start-from", help="LinFusion weights to go on from; default: the UNet's projections")
    add("--mid-dim-scale", type=int, help="non-linear projections as wide as dim / this")
    add("--steps", type=int, default=20_000)
    add("--minutes", type=float, help="of training, over all sessions of a run")
    add("--resolutions", type=int, nargs="+", help="sides in pixels (the model's own)")
    add("--resolution-weights", type=float, nargs="+", help="shares of the steps (equal)")
    add("--batch-size", type=int, default=8, help="at the smallest size (%(default)s)")
    add("--accumulate", type=int, default=1, help="batches to a step (%(default)s)")
    add("--pool", type=int, default=0, help="pictures to encode up front; 0: a batch at a time")
    add("--lr", type=float, default=1e-4, help="%(default)s")
    add("--warmup", type=int, default=100, help="steps (%(default)s)")
    add("--weight-decay", type=float, default=0.0)
    add("--drop-captions", type=float, default=0.1, help="share (%(default)s)")
    add("--ema", type=float, default=0.999, help="decay; 0: no average (%(default)s)")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="bf16 on CUDA, else no")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--compile", action="store_true", help="torch.compile the UNet, once for each size")
    add("--cuda-graph", action="store_true", help="replay each size's step from its fourth on")
    add("--half", action="store_true", help="write the weights in float16")
    add("--resume", action="store_true", help="go on from the checkpoint in --work, if any")
    add("--save-minutes", type=float, default=5, help="between checkpoints (%(default)s)")
    add("--log-every", type=int, default=50, help="steps (%(default)s)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.output is None:
        local = Path(args.model).is_dir()
        args.output = Path(args.model) / "linfusion" if local else Path("outputs/linfusion")
    if args.data is None:
        if Path(args.model).resolve() != TINY.resolve():
            parser.error(f"{args.model} needs --data: a folder of pictures with captions")
        args.data = "scenes"
    if args.resolution_weights and len(args.resolution_weights) != len(args.resolutions or ()):
        parser.error("--resolution-weights needs one number for each of --resolutions")
    if args.cuda_graph:
        clashes = {
            # How its losses are scaled has not been tried in a graph.
            "--mixed-precision fp16": args.mixed_precision == "fp16",
            # It asks for the state of random numbers, which a capture does not tell.
            "--gradient-checkpointing": args.gradient_checkpointing,
            "--compile": args.compile,
        }
        for option, given in clashes.items():
            if given:
                parser.error(f"--cuda-graph does not go with {option}")
        if not torch.cuda.is_available():
            parser.error("--cuda-graph needs a CUDA GPU")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision or ("bf16" if on_gpu else "no"),
        gradient_accumulation_steps=args.accumulate,
        # What autocast keeps from one use to the next would not be there in a replay.
        kwargs_handlers=[AutocastKwargs(cache_enabled=not args.cuda_graph)],
    )
    if args.cuda_graph and accelerator.distributed_type != DistributedType.NO:
        raise SystemExit("--cuda-graph is for a single process.")
    set_seed(args.seed, device_specific=True)
    train(accelerator, args)


if __name__ == "__main__":
    main()
