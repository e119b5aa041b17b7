"""Trains a small Stable Diffusion from nothing, on pictures it draws itself (see `scenes.py`).

Three stages, each skipped when it is already done: a byte-level BPE tokenizer; a KL autoencoder
that makes a quarter-size latent; and a CLIP text encoder with a UNet, trained together to predict
the velocity `v = sqrt(a) noise - sqrt(1 - a) latent` under a schedule that ends in pure noise.

    python examples/train_tiny_sd.py --output outputs/tiny_sd --minutes-vae 3 --minutes-unet 15

A stage ends after its steps or its minutes, whichever come first, and its learning rate follows
the larger of the two fractions. Interrupted, or stopped by `--limit-minutes`, the script saves
where it was under `--work`, and the same command goes on from there. Each call leaves a complete
fp16 pipeline in `--output`, a log of the losses beside it, and sheets of pictures in `--work`.
"""

import argparse
import random
from pathlib import Path

import scene_reader
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from scenes import caption, render, sample_scenes
from tiny_sd_parts import (
    build_diffusion,
    build_scheduler,
    build_tokenizer,
    build_vae,
    save_pipeline,
    tokenize,
)
from tiny_sd_trainer import Trainer
from torch import Tensor
from tqdm import tqdm


def train_vae(trainer: Trainer, vae: AutoencoderKL) -> bool:
    args, device = trainer.args, trainer.device

    def loss_of() -> Tensor:
        size, batch = random.choice(((128, args.batch_vae),) * 3 + ((256, args.batch_vae // 4),))
        pictures = render(sample_scenes(batch, random.getrandbits(40)), size, device) * 2 - 1
        posterior = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist
        output = vae.decode(posterior.sample()).sample.float()
        edges = [(output.diff(dim=d) - pictures.diff(dim=d)).abs().mean() for d in (2, 3)]
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        reconstruction = F.l1_loss(output, pictures) + F.mse_loss(output, pictures) + sum(edges)
        return reconstruction + args.kl * kl

    return trainer.fit(
        "vae", vae, loss_of, lr=args.lr_vae, steps=args.steps_vae, minutes=args.minutes_vae
    )


@torch.no_grad()
def finish_vae(trainer: Trainer, vae: AutoencoderKL) -> None:
    """Measures the latents' scale, writes it to the config, and draws pictures above copies."""
    device = trainer.device
    scenes = sample_scenes(max(24, trainer.args.preview), seed=1)
    pictures = render(scenes, 128, device)
    posterior = vae.encode(pictures * 2 - 1).latent_dist
    torch.manual_seed(trainer.args.seed)  # every call must find the same scale
    vae.register_to_config(scaling_factor=round(1 / posterior.sample().std().item(), 5))
    copies = (vae.decode(posterior.mode()).sample / 2 + 0.5).clamp(0, 1)
    noise = -10 * F.mse_loss(copies, pictures).log10().item()
    trainer.log(stage="vae", psnr=noise, scaling_factor=vae.config.scaling_factor)
    rows = [pictures[:12], copies[:12], pictures[12:24], copies[12:24]]
    save_sheet(torch.cat(rows), 12, trainer.args.work / "vae.png")
    right = scene_reader.rates(scene_reader.read(copies), scenes.describe())["all"]
    print(f"autoencoder: {noise:.1f} dB, {right:.1%} of its copies read right")


@torch.no_grad()
def make_pool(n: int, size: int, vae, tokenizer, seed: int) -> tuple[Tensor, Tensor]:
    """Scaled latents `(n, 4, size / 4, size / 4)` and token ids `(n, 32)`, on the VAE's device.

    Encoding the pictures once is far cheaper than drawing and encoding a batch at every step.
    """
    rng, latents, captions = random.Random(seed), [], []
    chunk = 2**23 // size**2
    for start in tqdm(range(0, n, chunk), desc=f"pictures at {size}", mininterval=5):
        scenes = sample_scenes(min(chunk, n - start), seed + size * n + start)
        pictures = render(scenes, size, vae.device) * 2 - 1
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=vae.device.type == "cuda"):
            encoded = vae.encode(pictures).latent_dist.sample()
        latents.append((encoded * vae.config.scaling_factor).to(torch.bfloat16))
        captions += [caption(scene, rng) for scene in scenes.describe()]
    return torch.cat(latents), tokenize(tokenizer, captions).to(vae.device)


def train_diffusion(trainer: Trainer, model, ema, vae, tokenizer) -> bool:
    args, device = trainer.args, trainer.device
    sizes, shares = (128, 192, 256), (1 - args.large, args.large / 2, args.large / 2)
    # A call that resumes draws pictures that the calls before it did not; none uses a small seed.
    seed = 10**9 * (1 + args.seed) + 10**12 * trainer.steps_done("unet")
    pools = {
        size: make_pool(args.pool if size == 128 else args.pool // 8, size, vae, tokenizer, seed)
        for size in sizes
    }
    empty = tokenize(tokenizer, [""]).to(device)
    signal_power = build_scheduler().alphas_cumprod.to(device)
    unet = torch.compile(model["unet"], dynamic=False) if args.compile else model["unet"]

    def loss_of() -> Tensor:
        size = random.choices(sizes, shares)[0]
        latents, tokens = pools[size]
        batch = max(1, args.batch * 128**2 // size**2)
        pick = torch.randint(len(latents), (batch,), device=device)
        latent = latents[pick].float()
        blank = torch.rand(batch, 1, device=device) < args.drop_captions
        text = model["text_encoder"](torch.where(blank, empty, tokens[pick]))[0]
        time_step = torch.randint(len(signal_power), (batch,), device=device)
        a = signal_power[time_step].view(-1, 1, 1, 1)
        noise = torch.randn_like(latent)
        noisy = a.sqrt() * latent + (1 - a).sqrt() * noise
        velocity = a.sqrt() * noise - (1 - a).sqrt() * latent
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        return F.mse_loss(unet(noisy, time_step, text).sample.float(), velocity)

    return trainer.fit(
        "unet", model, loss_of, lr=args.lr, steps=args.steps, minutes=args.minutes_unet, ema=ema
    )


def preview(trainer: Trainer, pipe: StableDiffusionPipeline, n: int) -> None:
    """Draws `n` captions at both sizes, has them read, and saves a sheet of the first ones."""
    scenes = sample_scenes(n, seed=2).describe()
    rng = random.Random(2)
    prompts = [caption(scene, rng) for scene in scenes]
    pipe = pipe.to(trainer.device, torch.float16 if trainer.device.type == "cuda" else torch.float)
    pipe.set_progress_bar_config(disable=True)
    for size in (128, 256):
        batches = [
            pipe(
                prompts[i : i + 64],
                height=size,
                width=size,
                num_inference_steps=trainer.args.preview_steps,
                guidance_scale=5.0,
                generator=torch.Generator().manual_seed(i),
                output_type="pt",
            ).images.float()
            for i in range(0, n, 64)
        ]
        pictures = torch.cat(batches)
        rates = scene_reader.rates(scene_reader.read(pictures), scenes)
        save_sheet(pictures[:32], 8, trainer.args.work / f"samples_{size}.png")
        trainer.log(stage="preview", size=size, pictures=n, **rates)
        print(f"{size}: " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))


def save_sheet(pictures: Tensor, columns: int, file: Path) -> None:
    pictures = pictures[: len(pictures) // columns * columns or len(pictures)]
    columns = min(columns, len(pictures))
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    sheet = torch.cat(rows, dim=1).clamp(0, 1).mul(255).round().byte()
    Image.fromarray(sheet.permute(1, 2, 0).cpu().numpy()).save(file)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/tiny_sd"), help="the pipeline's folder")
    add("--work", type=Path, default=Path("outputs/tiny_sd_work"), help="checkpoints, sheets")
    add("--only-vae", action="store_true", help="stop before the text encoder and the UNet")
    add("--limit-minutes", type=float, help="of this call, after which it saves and ends")
    add("--minutes-vae", type=float, help="of the stage, over all calls")
    add("--minutes-unet", type=float, help="of the stage, over all calls")
    add("--steps-vae", type=int, default=6000)
    add("--steps", type=int, default=30000, help="of the UNet and text encoder")
    add("--batch-vae", type=int, default=128, help="at 128 pixels; a quarter of it at 256")
    add("--batch", type=int, default=512, help="at 128 pixels; as many pixels at larger sizes")
    add("--lr-vae", type=float, default=1e-3)
    add("--lr", type=float, default=6e-4)
    add("--kl", type=float, default=1e-3, help="weight of the KL term, per latent number")
    add("--warmup", type=int, default=300, help="steps")
    add("--large", type=float, default=0.16, help="share of the steps at 192 and 256 pixels")
    add("--pool", type=int, default=200_000, help="pictures encoded; an eighth at 192 and 256")
    add("--drop-captions", type=float, default=0.1)
    add("--ema", type=float, default=0.9995)
    add("--preview", type=int, default=256, help="pictures to draw and read at the end")
    add("--preview-steps", type=int, default=25)
    add("--log-every", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="torch.compile the UNet")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--smoke", action="store_true", help="a few tiny steps of everything, for tests")
    args = parser.parse_args(arguments)
    if args.smoke:
        small = {"steps_vae": 4, "steps": 4, "batch_vae": 4, "batch": 4, "pool": 16, "preview": 1}
        vars(args).update(small, preview_steps=2, log_every=2, warmup=1, large=0.5)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    trainer = Trainer(args, device)
    tokenizer = build_tokenizer(args.output / "tokenizer")

    vae = build_vae().to(device, memory_format=torch.channels_last)
    done = train_vae(trainer, vae)
    vae.eval().requires_grad_(False)
    finish_vae(trainer, vae)
    if args.only_vae or not done:
        return

    torch.manual_seed(args.seed)
    model = build_diffusion(tokenizer).to(device, memory_format=torch.channels_last)
    ema = EMAModel(model.parameters(), decay=args.ema, foreach=True)
    done = train_diffusion(trainer, model, ema, vae, tokenizer)
    ema.copy_to(model.parameters())
    pipe = save_pipeline(args.output, vae, tokenizer, model["text_encoder"], model["unet"])
    preview(trainer, pipe, args.preview)
    print("done" if done else "stopped in time; run the same command to go on")


if __name__ == "__main__":
    main()
