"""The least time of a pass: the bytes that must cross memory, at the bandwidth of a copy.

Forward reads q, k, v and writes o; backward reads q, k, v, do and writes dq, dk, dv. Bandwidth
counts bytes read plus bytes written.
"""

from .cases import Case

# Tensors with a row for each query, and with a row for each key.
TENSORS = {"forward": (2, 2), "backward": (3, 4), "forward+backward": (5, 6)}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def pass_bytes(case: Case, name: str) -> int:
    """Bytes that the pass `name` must read and write."""
    of_queries, of_keys = TENSORS[name]
    row = case.B * case.H * case.D * ITEM_BYTES[case.dtype]
    return row * (of_queries * case.N + of_keys * case.keys)


def floor_ms(nbytes: int, bytes_per_second: float) -> float:
    return nbytes / bytes_per_second * 1e3
