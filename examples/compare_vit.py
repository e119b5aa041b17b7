"""Trains vision transformers that differ in their attention alone, several times each.

    python examples/compare_vit.py --dataset torch/fashion_mnist --data data --download --size 56 \
        --jobs 5 --cuda-graph --finetune 3 --output outputs/vit
    python examples/plot_vit.py outputs/vit/results.json --output examples/vit_curves.png

Each attention is trained from nothing with each seed by `train_vit.py`, on the same pictures with
the same budget. With `--finetune EPOCHS`, each is then put in the place of the softmax of each
trained softmax model and trained on for so long; softmax itself goes on as well, for comparison.
`--scratch softmax` leaves out what fine-tuning does not need.
Arguments that are unknown here go to `train_vit.py`.

Trainings run on all visible GPUs, `--jobs` at a time on each. One that is done is not repeated, and
one that was interrupted goes on where it was. All results are in `results.json`, with the curves
and, for each attention, the mean over seeds.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import sys
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing.queues import Queue
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

# The second is softmax with the kind of convolution that the linear layers have.
ATTENTIONS = ["softmax", "softmax_conv", "focused", "mlla", "rala"]
KEPT = ("steps", "losses", "epochs", "accuracy", "parameters", "seconds", "attention", "seed")


def run_one(words: list[str]) -> None:
    """One training in this process; what it says goes to `log.txt` in its folder."""
    from train_vit import main

    folder = folder_of(words)
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.txt").open("a")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        main([*words, "--resume"])


def gpus() -> list[str]:
    """Those that are visible, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(n) for n in range(count)]


def settle(places: Queue, count: int) -> None:
    """Takes one of `count` places, with its GPU and its share of the cores, for this process.

    That comes in time: CUDA reads the variable when it is first used, not when torch is imported.
    """
    gpu = places.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))


def processes(jobs: int) -> Executor:
    """As many as `jobs` on each GPU, or on the CPU."""
    # A process that was forked could not use the GPU.
    context = multiprocessing.get_context("spawn")
    taken: Queue = context.Queue()
    # The first ones on different GPUs, in case there are fewer trainings than places.
    places = (gpus() or [None]) * jobs
    for place in places:
        taken.put(place)
    return ProcessPoolExecutor(len(places), context, settle, (taken, len(places)))


def run_all(trainings: list[list[str]], pool: Executor, description: str) -> None:
    """Several at a time; the first that fails ends it, after those that run then."""
    left = [words for words in trainings if not (folder_of(words) / "result.json").exists()]
    bar = tqdm(total=len(trainings), initial=len(trainings) - len(left), desc=description)
    with bar:
        futures = {pool.submit(run_one, words): folder_of(words) for words in left}
        for future in as_completed(futures):
            folder = futures[future]
            if future.exception() is not None:
                pool.shutdown(cancel_futures=True)
                raise SystemExit(
                    f"{folder} failed: {future.exception()!r}. See {folder / 'log.txt'}."
                )
            result = json.loads((folder / "result.json").read_text())
            bar.write(f"{folder.name}: {result['accuracy']:.2%} in {result['seconds']:.0f} s")
            bar.update()


def folder_of(words: list[str]) -> Path:
    return Path(words[words.index("--output") + 1])


def summary(runs: list[dict]) -> dict[str, dict]:
    """For each attention: held-out accuracies in per cent, and how far they are from softmax's."""
    accuracies: dict[str, list[float]] = {}
    for run in runs:
        accuracies.setdefault(run["attention"], []).append(100 * run["accuracy"])
    means = {name: mean(values) for name, values in accuracies.items()}
    return {
        name: {
            "mean": round(means[name], 3),
            "deviation": round(stdev(values), 3) if len(values) > 1 else None,
            "seeds": [round(value, 3) for value in values],
            "from_softmax": (
                round(means[name] - means["softmax"], 3) if "softmax" in means else None
            ),
        }
        for name, values in accuracies.items()
    }


def table(title: str, rows: dict[str, dict]) -> str:
    lines = [f"| {title} | held-out accuracy | of each seed | from softmax |", "|---|---|---|---|"]
    for name, row in rows.items():
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        away = "" if row["from_softmax"] is None else f"{row['from_softmax']:+.2f}"
        seeds = ", ".join(f"{value:.2f}" for value in row["seeds"])
        lines.append(f"| {name} | {row['mean']:.2f}{spread} | {seeds} | {away} |")
    return "\n".join(lines)


def machine() -> dict[str, str | int]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    names = ("torch", "timm", "accelerate")
    count = max(1, torch.cuda.device_count())
    return {"device": gpu, "devices": count, **{name: version(name) for name in names}}


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attentions", nargs="+", default=ATTENTIONS)
    add("--scratch", nargs="+", metavar="NAME", help="those trained from nothing (all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--jobs", type=int, default=1, help="trainings at a time on each device (%(default)s)")
    add("--finetune", type=int, default=0, metavar="EPOCHS", help="also from softmax weights")
    add("--finetune-lr", type=float, default=5e-4, help="(%(default)s)")
    add("--output", type=Path, default=Path("outputs/vit"), help="(%(default)s)")
    args, more = parser.parse_known_args(arguments)
    scratch = args.scratch or args.attentions
    if args.finetune and "softmax" not in scratch:
        parser.error("--finetune starts from softmax, which is not trained from nothing")
    if not set(scratch) <= set(args.attentions):
        parser.error("--scratch names what is not among --attentions")
    command = " ".join(
        ["python", *(sys.argv if arguments is None else ["compare_vit.py", *arguments])]
    )

    pairs = [(name, seed) for seed in args.seeds for name in args.attentions]
    first = [words(args.output / f"{n}_{s}", n, s, more) for n, s in pairs if n in scratch]
    stages = {"scratch": first}
    if args.finetune:
        tuning = [*more, "--epochs", str(args.finetune), "--lr", str(args.finetune_lr)]
        stages["finetune"] = [
            words(
                args.output / f"finetune_{name}_{seed}",
                name,
                seed,
                [*tuning, "--start-from", str(args.output / f"softmax_{seed}")],
            )
            for name, seed in pairs
        ]
    results: dict = {"command": command, "machine": machine()}
    with processes(args.jobs) as pool:
        for stage, trainings in stages.items():
            run_all(trainings, pool, stage)
            found = [json.loads((folder_of(t) / "result.json").read_text()) for t in trainings]
            results["settings"] = results.get("settings", found[0]["settings"])
            runs = [{name: run[name] for name in KEPT} for run in found]
            results[stage] = {"summary": summary(runs), "runs": runs}
            (args.output / "results.json").write_text(json.dumps(results))
            print(table(stage, results[stage]["summary"]))
    return results


def words(output: Path, attention: str, seed: int, more: list[str]) -> list[str]:
    return ["--attention", attention, "--seed", str(seed), "--output", str(output), *more]


if __name__ == "__main__":
    main()
