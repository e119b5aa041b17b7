"""Every check of an operator's arguments, and the words of every error.

All of them run before anything is computed, and none looks at the values of a tensor.
"""

import math
import os

import torch

from .feature_maps import FEATURE_MAPS

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NORMALIZERS = ("mean", "sum")
IMPLEMENTATIONS = (None, "triton", "reference")


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Types, ranks, lengths, dtypes and devices of q `(B, H, N, K)`, k, v."""
    tensors = {"q": q, "k": k, "v": v}
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
        if x.layout != torch.strided or x.is_nested:
            layout = "nested" if x.is_nested else x.layout
            raise TypeError(f"{name} must be a dense strided tensor, got layout {layout}.")
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, head_dim), got "
                f"{name}.shape={tuple(x.shape)}. Pass a (batch, tokens, heads, head_dim) tensor "
                f"as {name}.transpose(1, 2); it is read in place."
            )
    for name, x in tensors.items():
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}.dtype={x.dtype} is not supported; use float16, bfloat16, float32 or "
                "float64."
            )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have one dtype, got q.dtype={q.dtype}, k.dtype={k.dtype} and "
            f"v.dtype={v.dtype}."
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, got q.device={q.device}, k.device={k.device} and "
            f"v.device={v.device}."
        )
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"q, k and v must have the same batch size, got q.shape[0]={q.shape[0]}, "
            f"k.shape[0]={k.shape[0]} and v.shape[0]={v.shape[0]}."
        )
    if k.shape[1] != v.shape[1]:
        raise ValueError(
            f"k and v must have the same number of heads, got k.shape[1]={k.shape[1]} and "
            f"v.shape[1]={v.shape[1]}."
        )
    if q.shape[1] != k.shape[1]:
        if k.shape[1] and q.shape[1] % k.shape[1] == 0:
            raise NotImplementedError(
                f"Grouped heads are not implemented yet, got q.shape[1]={q.shape[1]} and "
                f"k.shape[1]={k.shape[1]}. Repeat k and v: k.repeat_interleave("
                f"{q.shape[1] // k.shape[1]}, dim=1)."
            )
        raise ValueError(
            f"q and k must have the same number of heads, got q.shape[1]={q.shape[1]} and "
            f"k.shape[1]={k.shape[1]}."
        )
    if k.shape[2] != v.shape[2]:
        raise ValueError(
            f"k and v must have the same length, got k.shape[-2]={k.shape[2]} and "
            f"v.shape[-2]={v.shape[2]}."
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must have the same head_dim, got q.shape[-1]={q.shape[3]} and "
            f"k.shape[-1]={k.shape[3]}."
        )
    if q.shape[3] == 0:
        raise ValueError("The head_dim of q and k must be at least 1, got q.shape[-1]=0.")
    for name, x in tensors.items():
        if x.shape[3] > MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim up to {MAX_HEAD_DIM} is supported, got {name}.shape[-1]={x.shape[3]}. "
                "Use more heads."
            )


def check_feature_map(feature_map: str | None) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}, got "
            f"{feature_map!r}. Apply any other map to q and k first and pass feature_map=None."
        )


def check_normalizer(normalizer: str, eps: float) -> None:
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be 'mean' or 'sum', got {normalizer!r}.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps!r}.")


def check_scale(scale: float) -> None:
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale!r}.")


def check_unavailable(**options: object) -> None:
    """Arguments of the public signature that no implementation takes yet."""
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name} is not implemented yet; pass {name}=None.")


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
