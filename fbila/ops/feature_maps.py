"""The named feature maps phi, as plain PyTorch: what the kernels' fused maps must compute."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def identity(x: torch.Tensor) -> torch.Tensor:
    """`x`: the caller has applied a map already, or wants none."""
    return x


def elu1(x: torch.Tensor) -> torch.Tensor:
    """`elu(x) + 1`, positive everywhere (Katharopoulos et al., 2020; LinFusion, MLLA, RALA).

    Written as exp(x) for x <= 0, which keeps the digits that exp(x) - 1 + 1 loses; the inner
    `where` keeps exp, and with it the gradient, from overflowing where it is not used.
    """
    return torch.where(x > 0, x + 1, torch.exp(torch.where(x > 0, 0, x)))


def relu(x: torch.Tensor) -> torch.Tensor:
    """`max(x, 0)` (SANA, EfficientViT)."""
    return F.relu(x)


def relu_offset(x: torch.Tensor) -> torch.Tensor:
    """`max(x, 0) + 1e-6`, positive everywhere (FLatten, MHLA)."""
    return F.relu(x) + 1e-6


def exp(x: torch.Tensor) -> torch.Tensor:
    """`exp(x)`, which overflows float32 above 88: the caller keeps x in range."""
    return torch.exp(x)


def signed(x: torch.Tensor) -> torch.Tensor:
    """`[max(x, 0), max(-x, 0)]`, 2 K features of K channels, so that no sign is lost (PolaFormer).

    Of `sign(x) |x|^p` they are PolaFormer's powers of the positive and of the negative part; those
    of `-q` are its features for the other half of the values.
    """
    return torch.cat((F.relu(x), F.relu(-x)), -1)


FEATURE_MAPS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: identity,
    "elu1": elu1,
    "relu": relu,
    "relu_offset": relu_offset,
    "exp": exp,
    "signed": signed,
}


def feature_dim(head_dim: int, feature_map: str | None) -> int:
    """How many features a map makes of a head's channels."""
    return 2 * head_dim if feature_map == "signed" else head_dim
