"""The model of `train_vit.py`: a vision transformer of timm's with another attention."""

import argparse
from functools import partial

import timm
from safetensors.torch import load_file
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import nn
from vit_attention import put_in

SMALL = {"embed_dim": 128, "depth": 6, "num_heads": 4}


def convolutions(depth: int) -> dict:
    """Arguments of a model whose tokens come from convolutions, each of half the side.

    From patches softmax learns nothing of the drawn pictures for thousands of steps.
    """
    stem = ConvStem(depth=depth, stride=(2,) * depth)
    return {"patch_size": 1, "embed_layer": partial(HybridEmbed, backbone=stem)}


def build(args: argparse.Namespace, classes: int) -> nn.Module:
    """The model, with its attention put in after its weights are there."""
    model = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        img_size=args.size,
        num_classes=classes,
        class_token=False,
        global_pool="avg",
        drop_path_rate=args.drop_path,
        **args.model_kwargs,
        **(convolutions(args.stem) if args.stem else {}),
    )
    if args.start_from is not None:
        model.load_state_dict(load_file(args.start_from / "model.safetensors"))
    return put_in(model, args.attention, args.pretrained or args.start_from is not None)
