"""The checks of options that are no tensors, and the choice of the implementation.

`tensor_checks.py` has those of q, k and v, `option_checks.py` those of the options that are
tensors. All run before anything is computed, and none looks at the values of a tensor.
"""

import math
import os

import torch

from .feature_maps import FEATURE_MAPS, feature_dim
from .tensor_checks import MAX_HEAD_DIM

NORMALIZERS = ("mean", "sum")
# Published models use 3. Sums of squares of higher powers leave float32's range.
MOST_FOCUSING = 32
IMPLEMENTATIONS = (None, "triton", "reference")


def check_feature_map(feature_map: str | None) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}, got "
            f"{feature_map!r}. Apply any other map to q and k first and pass feature_map=None."
        )


def check_feature_dim(head_dim: int, feature_map: str | None) -> None:
    features = feature_dim(head_dim, feature_map)
    if features > MAX_HEAD_DIM:
        raise ValueError(
            f"feature_map={feature_map!r} makes {features} features of head_dim={head_dim}, and at "
            f"most {MAX_HEAD_DIM} are supported."
        )


def check_normalizer(normalizer: str, eps: float) -> None:
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be 'mean' or 'sum', got {normalizer!r}.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps!r}.")


def check_scale(scale: float) -> None:
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale!r}.")


def check_focusing_factor(focusing_factor: float) -> None:
    if not 0 < focusing_factor <= MOST_FOCUSING:
        raise ValueError(
            f"focusing_factor must be positive and at most {MOST_FOCUSING}, got "
            f"{focusing_factor!r}."
        )


def choose_implementation(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """'triton' on CUDA, else 'reference'; an explicit request is honoured or refused."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be None, 'triton' or 'reference', got {impl!r}.")
    if impl is None:
        return "triton" if device.type == "cuda" else "reference"
    if impl == "triton" and device.type != "cuda":
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if not (interpreted or device.type == "meta"):
            raise ValueError(
                f"impl='triton' needs CUDA tensors, got device={str(device)!r}. Pass impl=None to "
                "use PyTorch there, or set TRITON_INTERPRET=1 before Python starts to run the "
                "kernels on the CPU, slowly."
            )
        if interpreted and dtype == torch.bfloat16:
            raise TypeError(
                "Triton's interpreter computes bfloat16 wrongly. Pass impl='reference', or use "
                "float16, float32 or float64 with impl='triton' on the CPU."
            )
    return impl
