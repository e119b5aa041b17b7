"""Cases of `sm_90_blocks.py`: what is of tokens in the blocks of vision models."""

import itertools
from functools import partial

import torch
from sm_90 import LAYOUTS

from fbila.ops import (
    layer_scale,
    linear,
    magnitude,
    parts,
    rotated_parts,
    signed_map_backward_library,
    signed_map_library,
    silu_gate_library,
    window_attention_library,
)

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def planes(*shape: int, last: str = "nchw") -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=FORMATS[last])


def of_tokens():
    """(name, function without arguments)."""
    yield from small_maps()
    yield from signed_maps()
    yield from magnitudes()
    yield from windows()


def small_maps():
    """Gates, sums, layer scales, and parts of projections."""
    x = planes(2, 256, 320)
    yield "silu_gate", partial(silu_gate_library.in_kernel, x, x)
    yield "gradient of silu_gate", partial(silu_gate_library.backward_in_kernel, x, x, x)
    for C in (96, 384, 1000):
        yield f"column_sums {C}", partial(linear.column_sums, x.new_zeros(512, C))
    yield "gelu_backward", partial(linear.gelu_backward, x, x)
    # As under autocast, and of one dtype.
    for C, kinds in itertools.product(
        (64, 512, 1000),
        (
            (torch.float32, torch.float32, torch.bfloat16),
            (torch.bfloat16,) * 3,
            (torch.float32,) * 3,
        ),
    ):
        wide, scale, y = (
            torch.zeros(shape, dtype=kind)
            for shape, kind in zip(((512, C), (C,), (512, C)), kinds, strict=True)
        )
        name = f"{C} {kinds[0]} {kinds[2]}"
        yield f"add_scaled {name}", partial(layer_scale.in_kernel, wide, scale, y)
        for kept, given in (("all", (scale, y)), ("dy", (scale, None)), ("ds", (None, y))):
            yield (
                f"{kept} of gradients of add_scaled {name}",
                partial(layer_scale.backward_in_kernel, wide, *given, *kinds[1:]),
            )
    # Of RAVLT's softmax attention at 224 and 512 px, and narrower heads.
    for (N, heads, d), dtype in itertools.product(
        ((196, 5, 64), (256, 8, 64), (49, 3, 32)), (torch.bfloat16, torch.float16, torch.float32)
    ):
        whole, tables = torch.zeros(4, N, 4, heads, d, dtype=dtype), torch.zeros(2, N, d // 2)
        name, part = f"rotated_parts {N} {d} {dtype}", whole[:, :, 0].clone()
        yield name, partial(rotated_parts.in_kernel, whole, *tables)
        yield (
            f"gradient of {name}",
            partial(rotated_parts.backward_in_kernel, *4 * [part], *tables),
        )
    # A gradient among those of three parts, and of VSSD's, which are not as wide as each other.
    for (rows, C, whole), dtype in itertools.product(
        ((200704, 96, 288), (200704, 128, 392)), (torch.bfloat16, torch.float16, torch.float32)
    ):
        place = torch.zeros(rows, whole, dtype=dtype)[:, :C]
        x, y = torch.zeros(2, rows, C, dtype=dtype)
        for name, other in (("put", None), ("sum", y)):
            yield f"{name} {C} {dtype}", partial(parts.put, place, x, other)


def windows():
    """Of Swin's stage 3 for 224 x 224 and 512 x 512 pixels, whose windows go beyond the grid."""
    for side, shift, dtype in (
        *itertools.product((14, 32), (0, 3), (torch.bfloat16,)),
        (14, 3, torch.float16),
        (14, 3, torch.float32),
    ):
        qkv, y = planes(4, side, side, 1152).to(dtype), planes(4, side, side, 384).to(dtype)
        arguments = qkv, torch.zeros(169, 12), torch.zeros(1152), (7, 7), (shift, shift)
        name = f"window_attention {side} {shift} {dtype}"
        yield name, partial(window_attention_library.in_kernel, *arguments)
        yield (
            f"gradients of {name}",
            partial(window_attention_library.backward_in_kernel, y, *arguments),
        )


def magnitudes():
    """Of MAViT's second stage at 224 px, and of other heads, in each of three orders in memory."""
    for (order, axes), (d, dtype) in itertools.product(
        LAYOUTS.items(),
        (
            *((64, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
            *((d, torch.bfloat16) for d in (32, 96)),
        ),
    ):
        a, s, mean = (
            torch.zeros([(2, 2, rows, columns)[axis] for axis in axes], dtype=kind).permute(axes)
            for rows, columns, kind in ((784, d, dtype), (784, 1, dtype), (1, d, torch.float32))
        )
        name = f"magnitude {d} {order} {dtype}"
        yield name, partial(magnitude.in_kernel, a, s, mean, 1e-6)
        for wanted, given, needed in (
            ("all", (a, s, mean), (True, True)),
            ("da", (None, s, None), (True, False)),
            ("ds", (a, None, mean), (False, False)),
            ("dm", (None, s, None), (False, True)),
        ):
            yield (
                f"{wanted} of gradients of {name}",
                partial(magnitude.backward_in_kernel, a, *given, 1e-6, 784, *needed),
            )


def signed_maps():
    """Of PolaFormer's and PolaFormer++'s queries and keys, a part of a projection."""
    for (C, H), dtype in (
        ((96, 3), torch.bfloat16),
        ((512, 16), torch.bfloat16),
        ((96, 3), torch.float16),
        ((96, 3), torch.float32),
    ):
        packed = torch.zeros(2, 784, 4, H, C // H, dtype=dtype)
        x, dy = packed[:, :, 1].transpose(1, 2), packed[:, :, 0].contiguous().transpose(1, 2)
        positions, table = torch.zeros(784, H, C // H), torch.zeros(4, H, C // H)
        for name, addend, rows, kind, both in (
            ("queries", None, table[:2], "power", False),
            ("keys", positions, table[:2], "power", True),
            ("keys", None, None, "expm1", False),
            ("queries", None, table, "expm1", True),
        ):
            name = f"signed_map {C} {name} {kind} {dtype}"
            arguments = x, addend, rows, kind
            yield name, partial(signed_map_library.in_kernel, *arguments, both)
            other = dy if both else None
            needed = [True, False, rows is not None]
            yield (
                f"gradient of {name}",
                partial(signed_map_backward_library.in_kernel, dy, other, *arguments, needed),
            )
