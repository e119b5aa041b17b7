"""What the constructors of the layers refuse, and the words of it."""


def check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim, got dim={dim} and num_heads={num_heads}")


def check_even_head_dim(dim: int, num_heads: int, reason: str) -> None:
    check_heads(dim, num_heads)
    if dim // num_heads % 2:
        raise ValueError(
            f"dim / num_heads must be even, since {reason}; got dim={dim} and num_heads={num_heads}"
        )


def check_attn_drop(attn_drop: float) -> None:
    if attn_drop:
        raise ValueError(
            f"attn_drop={attn_drop}: linear attention has no attention map to drop entries of; "
            "use proj_drop"
        )


def check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            "kernel_size must be odd, or the convolution would change the size of the grid; got "
            f"kernel_size={kernel_size}"
        )


def check_sr_ratio(sr_ratio: int | None) -> None:
    if sr_ratio is not None and sr_ratio < 1:
        raise ValueError(f"sr_ratio must be at least 1, or None, got sr_ratio={sr_ratio}")
