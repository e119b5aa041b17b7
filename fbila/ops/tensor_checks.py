"""The checks of q, k and v, and the words of their errors."""

import torch

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, packed: bool = False
) -> None:
    """q `(B, H, N, K)`, k and v; packed: `(T, H, K)`, of one length."""
    tensors = {"q": q, "k": k, "v": v}
    _check_kinds(tensors, packed)
    _check_keys(k, v, packed)
    check_groups(q.shape[1], k.shape[1], "k.shape[1]")
    if packed and q.shape[0] != k.shape[0]:
        raise ValueError(
            "With cu_seqlens queries and keys are the same tokens: q and k must have the same "
            f"length, got q.shape[0]={q.shape[0]} and k.shape[0]={k.shape[0]}."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            _differ("have the same head_dim", "shape[-1]", q=q.shape[-1], k=k.shape[-1])
        )
    _check_head_dims(tensors)


def check_keys(k: torch.Tensor, v: torch.Tensor) -> None:
    """k `(B, H, M, K)` and v, without a q."""
    tensors = {"k": k, "v": v}
    _check_kinds(tensors, packed=False)
    _check_keys(k, v, packed=False)
    _check_head_dims(tensors)


def check_query(q: torch.Tensor) -> None:
    """q `(B, H, N, K)`, without k and v."""
    _check_kinds({"q": q}, packed=False)
    _check_head_dims({"q": q})


def check_groups(query_heads: int, key_heads: int, name: str) -> None:
    """Query heads share the key heads in groups of one size; `name` says where those are from."""
    if query_heads != key_heads and not (key_heads and query_heads % key_heads == 0):
        raise ValueError(
            "q must have as many heads as k and v or a multiple of them, got "
            f"q.shape[1]={query_heads} and {name}={key_heads}."
        )


def check_dense(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense strided tensor, got layout {layout}.")


def check_dtype(name: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name}.dtype={x.dtype} is not supported; use float16, bfloat16, float32 or float64."
        )


def check_device(name: str, x: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, got {name}.device={x.device} and "
            f"{like_name}.device={like.device}."
        )


def _check_kinds(tensors: dict[str, torch.Tensor], packed: bool) -> None:
    """Types, ranks, and what all must have in common: dtype, device and batch size."""
    for name, x in tensors.items():
        check_dense(name, x)
        check_dtype(name, x)
        if packed and x.dim() != 3:
            raise ValueError(
                f"With cu_seqlens {name} must have 3 dimensions (tokens, heads, head_dim), got "
                f"{name}.shape={tuple(x.shape)}."
            )
        if not packed and x.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, heads, tokens, head_dim), got "
                f"{name}.shape={tuple(x.shape)}. Pass a (batch, tokens, heads, head_dim) tensor "
                f"as {name}.transpose(1, 2); it is read in place."
            )
    first, *others = tensors.values()
    for x in others:
        if x.dtype != first.dtype:
            dtypes = {name: x.dtype for name, x in tensors.items()}
            raise TypeError(_differ("have one dtype", "dtype", **dtypes))
        if x.device != first.device:
            devices = {name: x.device for name, x in tensors.items()}
            raise ValueError(_differ("be on one device", "device", **devices))
        if not packed and x.shape[0] != first.shape[0]:
            sizes = {name: x.shape[0] for name, x in tensors.items()}
            raise ValueError(_differ("have the same batch size", "shape[0]", **sizes))


def _check_keys(k: torch.Tensor, v: torch.Tensor, packed: bool) -> None:
    if k.shape[1] != v.shape[1]:
        heads = {"k": k.shape[1], "v": v.shape[1]}
        raise ValueError(_differ("have the same number of heads", "shape[1]", **heads))
    axis = 0 if packed else -2
    if k.shape[axis] != v.shape[axis]:
        lengths = {"k": k.shape[axis], "v": v.shape[axis]}
        raise ValueError(_differ("have the same length", f"shape[{axis}]", **lengths))


def _check_head_dims(tensors: dict[str, torch.Tensor]) -> None:
    for name, x in tensors.items():
        width = x.shape[-1]
        if width == 0 and name != "v":
            raise ValueError(f"The head_dim of q and k must be at least 1, got {name}.shape[-1]=0.")
        if width > MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim up to {MAX_HEAD_DIM} is supported, got {name}.shape[-1]={width}. "
                "Use more heads."
            )


def _differ(what: str, attribute: str, **values: object) -> str:
    """`q, k and v must <what>, got q.<attribute>=1, k.<attribute>=2 and ...`."""
    got = [f"{name}.{attribute}={value}" for name, value in values.items()]
    return f"{_join(list(values))} must {what}, got {_join(got)}."


def _join(words: list[str]) -> str:
    """`a, b and c`; there are at least two."""
    return f"{', '.join(words[:-1])} and {words[-1]}"
