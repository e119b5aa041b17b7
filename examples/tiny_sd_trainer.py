"""The loop of `train_tiny_sd.py`, which can stop at any time and go on from there later."""

import argparse
import json
import math
import random
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm


class Trainer:
    """Runs a stage's steps: schedule, log, checkpoint, and stopping in time."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.started = time.monotonic()
        self.stopped = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))

    def out_of_time(self) -> bool:
        limit = self.args.limit_minutes
        return self.stopped or (limit and time.monotonic() - self.started > 60 * limit)

    def steps_done(self, stage: str) -> int:
        file, _ = self._files(stage)
        return torch.load(file, weights_only=True, mmap=True)["step"] if file.exists() else 0

    def fit(self, stage, model, loss_of, *, lr, steps, minutes, ema=None) -> bool:
        """Trains `model` on `loss_of()` until the stage is done; returns whether it is."""
        cuda = self.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda
        )
        step, before = self._resume(stage, model, optimizer, ema)
        # Draws depend on the seed and on where this call started, so that a repeat repeats them.
        torch.manual_seed(self.args.seed + step)
        random.seed(self.args.seed + step)
        started = saved = time.monotonic()
        total, count = torch.zeros((), device=self.device), 0
        bar = tqdm(total=steps, initial=step, desc=stage, mininterval=5)

        def progress() -> float:
            spent = before + time.monotonic() - started
            return max(step / steps, spent / (60 * minutes) if minutes else 0)

        while progress() < 1 and not self.out_of_time():
            rate = lr * min(1, (step + 1) / self.args.warmup)
            rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * progress())) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda):
                loss = loss_of()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.step(model.parameters())
            # The sum stays on the device; reading it at every step would stall it.
            total, count, step = total + loss.detach(), count + 1, step + 1
            bar.update()
            if step % self.args.log_every == 0:
                seconds = before + time.monotonic() - started
                mean = total.item() / count
                total, count = torch.zeros((), device=self.device), 0
                self.log(stage=stage, step=step, seconds=seconds, loss=mean, lr=rate)
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            if time.monotonic() - saved > 120:
                seconds = before + time.monotonic() - started
                self._save(stage, model, optimizer, ema, step, seconds)
                saved = time.monotonic()
        bar.close()
        seconds = before + time.monotonic() - started
        self._save(stage, model, optimizer, ema, step, seconds)
        return progress() >= 1

    def _files(self, stage: str) -> tuple[Path, Path]:
        return self.args.work / f"{stage}.pt", self.args.work / f"{stage}_optimizer.pt"

    def _save(self, stage, model, optimizer, ema, step, seconds) -> None:
        self.args.work.mkdir(parents=True, exist_ok=True)
        state = {"step": step, "seconds": seconds, "model": model.state_dict()}
        if ema:
            state["ema"] = ema.state_dict()
        for file, content in zip(self._files(stage), (state, optimizer.state_dict()), strict=True):
            # Renamed into place, so that being killed while writing leaves the last good file.
            torch.save(content, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)

    def _resume(self, stage, model, optimizer, ema) -> tuple[int, float]:
        file, moments = self._files(stage)
        if not file.exists():
            return 0, 0.0
        state = torch.load(file, map_location=self.device, weights_only=True)
        model.load_state_dict(state["model"])
        if ema:
            ema.load_state_dict(state["ema"])
            ema.to(self.device)
        # Without its moments the optimizer finds them anew within a few dozen steps.
        if moments.exists():
            optimizer.load_state_dict(torch.load(moments, map_location=self.device))
        return state["step"], state["seconds"]

    def log(self, **entry) -> None:
        self.args.output.mkdir(parents=True, exist_ok=True)
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in entry.items()}
        with (self.args.output / "training.jsonl").open("a") as log:
            log.write(json.dumps(rounded) + "\n")
