"""Trains a vision transformer of timm's with linear attention, from nothing or from softmax's.

    python examples/train_vit.py --attention focused --output outputs/focused
    python examples/train_vit.py --attention focused --start-from outputs/softmax --epochs 2
    python examples/train_vit.py --dataset torch/fashion_mnist --data data --size 56
    accelerate launch examples/train_vit.py --data pictures/ --size 224 --attention rala \
        --model vit_small_patch16_224 --model-kwargs --batch-size 256 --epochs 300 --mixup 0.8

The model is timm's, without class token; only its attention differs. So are the ingredients:
transforms and loader, Mixup and label smoothing, optimizer, schedule, and the average of weights,
which is what is evaluated, on held-out pictures, after each epoch. `--data` is a folder with
`train` and `val`, each with a folder of pictures for each class, or, with `--dataset`, the one that
holds that; without either, pictures are drawn.

Weights (`model.safetensors`), curves (`result.json`) and, after each epoch, all that is needed to
go on (`checkpoint.pt`) are in `--output`; `--resume` goes on there, on a CPU bit for bit.
`compare_vit.py` makes many such trainings and `plot_vit.py` their curves.
"""

import argparse
import ast
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

try:
    from accelerate import Accelerator
    from accelerate.utils import AutocastKwargs, DistributedType, set_seed
    from timm.data import Mixup
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3
except ImportError as error:
    raise SystemExit(f"{error}. This example needs: pip install fbila[train,timm]") from error

from graphed import Graphed
from vit_data import add_arguments, loaders
from vit_model import SMALL, build

NAMES = "softmax, softmax_conv, focused, mlla, rala, a layer of fbila.layers or a feature map"


class Record:
    """The curves: what `result.json` holds."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.epochs: list[dict] = []
        self.seconds = 0.0

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader) -> dict[str, float]:
    """Accuracy and cross-entropy on all pictures of a loader."""
    model.eval()
    right = loss = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    count = 0
    for x, y in loader:
        x, y = x.to(accelerator.device), y.to(accelerator.device)
        with accelerator.autocast():
            logits = model(x)
        right = right + (logits.argmax(1) == y).sum()
        loss = loss + nn.functional.cross_entropy(logits.float(), y, reduction="sum")
        count += len(y)
    return {"accuracy": right.item() / count, "held_out_loss": loss.item() / count}


def train(accelerator: Accelerator, args: argparse.Namespace) -> dict:
    """Trains, and returns what `result.json` holds."""
    args.output.mkdir(parents=True, exist_ok=True)
    loader, held_out, classes = loaders(args, accelerator)
    if len(loader) == 0:
        raise SystemExit(f"There are fewer training pictures than --batch-size {args.batch_size}.")
    set_seed(args.seed)
    model = build(args, classes)
    parameters = sum(p.numel() for p in model.parameters())
    ema = ModelEmaV3(model.to(accelerator.device), decay=args.ema, use_warmup=True)
    optimizer = create_optimizer_v2(
        model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, args.beta2)
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=args.epochs,
        min_lr=args.lr / 100,
        warmup_lr=args.lr / 1000,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=classes)
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(args.smoothing)
    record, first = Record(), 0
    checkpoint = args.output / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=accelerator.device, weights_only=True)
        first = state["epoch"]
        for name, part in (("model", model), ("ema", ema.module), ("optimizer", optimizer)):
            part.load_state_dict(state[name])
        record.load_state_dict(state["record"])
        accelerator.print(f"resumed after epoch {first}")
    raw = model
    model, optimizer = accelerator.prepare(model, optimizer)

    def differentiate(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with accelerator.autocast():
            logits = model(x)
        loss = criterion(logits.float(), y)
        accelerator.backward(loss)
        return {"loss": loss.detach()}

    if args.cuda_graph:
        differentiate = Graphed(differentiate, model.parameters())

    bar = tqdm(
        total=args.epochs * len(loader),
        initial=first * len(loader),
        desc=args.attention,
        mininterval=2,
        disable=not accelerator.is_main_process,
    )
    total, count = torch.zeros((), device=accelerator.device), 0
    for epoch in range(first, args.epochs):
        since = time.monotonic()
        # Of the epoch, so that one that resumes draws what the one before would have drawn.
        set_seed(args.seed + 1000 * (epoch + 1) + 10**7 * accelerator.process_index)
        if accelerator.num_processes > 1 and hasattr(loader, "sampler"):
            loader.sampler.set_epoch(epoch)
        model.train()
        for step, (x, y) in enumerate(loader, start=epoch * len(loader)):
            scheduler.step_update(step)
            x, y = x.to(accelerator.device), y.to(accelerator.device)
            if mixup:
                x, y = mixup(x, y)
            loss = differentiate(x=x, y=y)["loss"]
            if args.clip:
                accelerator.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not args.cuda_graph)
            ema.update(raw, step=step)
            # The sum stays on the device: reading it at every step would stall it.
            total, count = total + loss, count + 1
            bar.update()
            if (step + 1) % args.log_every == 0:
                mean = finite(total.item() / count, step)
                record.steps.append(step + 1)
                record.losses.append(mean)
                total, count = torch.zeros_like(total), 0
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        seconds = time.monotonic() - since
        record.seconds += seconds
        entry = {"epoch": epoch + 1, "step": (epoch + 1) * len(loader), "seconds": seconds}
        entry.update(evaluate(accelerator, ema.module, held_out))
        record.epochs.append(entry)
        bar.write(f"epoch {epoch + 1}: {entry['accuracy']:.2%} right of held-out pictures")
        # The mean that is logged next starts with the next epoch, for one that resumes as for one
        # that goes on.
        total, count = torch.zeros_like(total), 0
        if accelerator.is_main_process:
            state = {
                "epoch": epoch + 1,
                "model": raw.state_dict(),
                "ema": ema.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "record": record.state_dict(),
            }
            save(state, checkpoint)
    bar.close()
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    result = {
        "attention": args.attention,
        "seed": args.seed,
        "parameters": parameters,
        "accuracy": record.epochs[-1]["accuracy"],
        **record.state_dict(),
        "settings": settings,
    }
    if accelerator.is_main_process:
        weights: dict[str, Tensor] = {k: v.contiguous() for k, v in ema.module.state_dict().items()}
        save_file(weights, args.output / "model.safetensors")
        (args.output / "result.json").write_text(json.dumps(result, indent=1))
    return result


def finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss} at step {step + 1}; lower --lr")
    return loss


def save(state: dict, file: Path) -> None:
    """Renamed into place, so that being killed while writing leaves the last good file."""
    torch.save(state, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attention", default="focused", help=f"{NAMES} (%(default)s)")
    add("--model", default="vit_tiny_patch16_224", help="of timm (%(default)s)")
    add("--model-kwargs", nargs="*", metavar="NAME=VALUE", help="for it (a small model)")
    add("--stem", type=int, help="convolutions of stride 2 for patches (2 in the small model)")
    add("--pretrained", action="store_true", help="start from timm's weights")
    add("--start-from", type=Path, help="--output of a training with softmax to start from")
    add("--output", type=Path, help="(outputs/vit/ATTENTION)")
    add("--resume", action="store_true", help="go on from the checkpoint in --output, if any")
    add("--epochs", type=int, default=24, help="warm-up included (%(default)s)")
    add("--batch-size", type=int, default=128, help="for each process (%(default)s)")
    add("--opt", default="adamw", help="timm's name of an optimizer (%(default)s)")
    add("--lr", type=float, default=2e-3, help="at its peak (%(default)s)")
    add("--beta2", type=float, default=0.99, help="(%(default)s)")
    add("--warmup-epochs", type=int, default=1, help="(%(default)s)")
    add("--weight-decay", type=float, default=0.05, help="(%(default)s)")
    add("--clip", type=float, default=1.0, help="norm of gradients; 0: any (%(default)s)")
    add("--mixup", type=float, default=0.1, help="alpha; 0: none (%(default)s)")
    add("--cutmix", type=float, default=0.0, help="alpha; 0: none (%(default)s)")
    add("--smoothing", type=float, default=0.1, help="of labels (%(default)s)")
    add("--drop-path", type=float, default=0.0, help="(%(default)s)")
    add("--ema", type=float, default=0.998, help="decay of the average (%(default)s)")
    add("--mixed-precision", choices=("no", "bf16"), help="bf16 on CUDA, else no")
    add("--cuda-graph", action="store_true", help="replay the step from its fourth on")
    add("--log-every", type=int, default=16, help="steps (%(default)s)")
    add("--seed", type=int, default=0)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    try:
        given = dict(pair.split("=", 1) for pair in args.model_kwargs or ())
        given = {name: ast.literal_eval(value) for name, value in given.items()}
    except (ValueError, SyntaxError):
        parser.error(
            "--model-kwargs are NAME=VALUE, with numbers, tuples or quoted words as values"
        )
    if args.cuda_graph and not torch.cuda.is_available():
        parser.error("--cuda-graph needs a CUDA GPU")
    if args.model_kwargs is None:
        given, args.stem = SMALL, 2 if args.stem is None else args.stem
    args.model_kwargs = given
    if args.output is None:
        args.output = Path("outputs/vit") / args.attention
    return args


def main(arguments: list[str] | None = None) -> dict:
    args = parse(arguments)
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision or ("bf16" if on_gpu else "no"),
        # What autocast keeps from one use to the next would not be there in a replay.
        kwargs_handlers=[AutocastKwargs(cache_enabled=not args.cuda_graph)],
    )
    if args.cuda_graph and accelerator.distributed_type != DistributedType.NO:
        raise SystemExit("--cuda-graph is for a single process.")
    return train(accelerator, args)


if __name__ == "__main__":
    main()
