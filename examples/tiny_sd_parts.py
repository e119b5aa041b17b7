"""The parts of the small Stable Diffusion that `train_tiny_sd.py` trains, and its folder."""

import copy
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from scenes import caption, sample_scenes
from tokenizers import pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FACTOR = 4  # pixels to a latent's side
TEXT_LENGTH = 32
TEXT_WIDTH = 128


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learned from captions; every caption word is one token."""
    rng = random.Random(0)
    captions = [caption(scene, rng) for scene in sample_scenes(5000, seed=0).describe()]
    blank = CLIPTokenizer()  # for CLIP's own normalisation and splitting
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    blank.backend_tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(blank.backend_tokenizer.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in learned["merges"]]
    # CLIP's order: every byte, every byte that ends a word, the merges, then start and end.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    # Releases of transformers before 5 read these two files instead of tokenizer.json.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    encoded = tokenizer(
        texts,
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=128,
    )


def build_diffusion(tokenizer: CLIPTokenizer) -> torch.nn.ModuleDict:
    """The text encoder and the UNet, which are trained together."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=128 // FACTOR,
        block_out_channels=(96, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        # diffusers takes this as the number of heads: heads of 32 channels at every level.
        attention_head_dim=(3, 4, 4),
        cross_attention_dim=TEXT_WIDTH,
    )
    return torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})


def build_scheduler() -> DDIMScheduler:
    """Ends in pure noise, so that the first step decides the ground's colour freely."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # what StableDiffusionPipeline expects; trailing spacing ignores it
    )


def save_pipeline(folder: Path, vae, tokenizer, text_encoder, unet) -> StableDiffusionPipeline:
    """Writes the fp16 pipeline folder and returns the pipeline."""
    modules = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    pipe = StableDiffusionPipeline(
        **{name: copy.deepcopy(module).half().eval() for name, module in modules.items()},
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    # The tensors' names that every release of transformers reads; 5 alone writes shorter ones.
    weights = folder / "text_encoder" / "model.safetensors"
    named = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(weights).items()
    }
    save_file(named, weights, metadata={"format": "pt"})
    return pipe
