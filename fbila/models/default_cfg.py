"""What timm is told of a model that was trained on ImageNet-1K at 224 x 224."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def imagenet_cfg(**more: Any) -> dict[str, Any]:
    """A `default_cfg` of timm, without weights to download; `more` adds to it or replaces."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        **more,
    }
