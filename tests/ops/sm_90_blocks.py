"""As `sm_90.py`, of the kernels around attention: norms, activations and sums of residual blocks.

A script that prints, for each kernel of each case, the bytes of each access by tensor, and what the
kernel takes of a multiprocessor.
"""

import itertools
import json
import re
from functools import partial

import torch
from sm_90 import LAYOUTS, Arguments, accesses, compile_sm_90, resources

from fbila.ops import (
    add_bias_library,
    depthwise_conv_library,
    gated_conv_backward_library,
    gated_conv_library,
    gated_norm_library,
    geglu_library,
    group_norm_backward_library,
    group_norm_library,
    layer_scale,
    linear,
    magnitude,
    norm_library,
    parts,
    rms_norm_library,
    rotated_parts,
    separable_conv_library,
    signed_map_backward_library,
    signed_map_library,
    silu_gate_library,
    window_attention_library,
)
from fbila.ops.kernels.launch import Launch

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def planes(*shape: int, last: str = "nchw") -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=FORMATS[last])


def gradient(dy: torch.Tensor, x: torch.Tensor, *vectors: torch.Tensor | None) -> None:
    statistics = torch.zeros(2, len(x), 32)
    group_norm_backward_library.in_kernel(dy, x, *vectors, statistics, True)


def calls():
    """(name, function without arguments) for the widths of Stable Diffusion."""
    for last in FORMATS:
        for C, side in ((320, 128), (640, 32), (2560, 16)):
            x, channel = planes(2, C, side, side, last=last), planes(C)
            options = (planes(2, C), channel, channel, channel, 32, 1e-5, True)
            for name, last_y in (("", False), (" to channels_last", True)):
                yield (
                    f"group_norm {C} {side} {last}{name}",
                    lambda x=x, options=options, last_y=last_y: group_norm_library.in_kernel(
                        x, *options, last_y
                    ),
                )
            for other in FORMATS:
                dy = planes(2, C, side, side, last=other)
                yield (
                    f"gradient of group_norm {C} {side} {last} {other}",
                    partial(gradient, dy, x, planes(2, C), channel, channel, channel),
                )
            dy, weight = planes(2, C, side, side, last=last), channel.float()
            yield (
                f"gradient of group_norm {C} {side} {last} of float32",
                partial(gradient, dy, x.float(), None, None, weight, weight),
            )
            # Under autocast.
            wide = x.float()
            options = (None, None, weight, weight, 32, 1e-5, True, False, torch.bfloat16)
            yield (
                f"group_norm {C} {side} {last} of float32",
                lambda x=wide, options=options: group_norm_library.in_kernel(x, *options),
            )
            for other, dtype in itertools.product(FORMATS, (torch.bfloat16, torch.float32)):
                residual = planes(2, C, side, side, last=other).to(dtype)
                yield (
                    f"add_bias {C} {side} {last} {other} {dtype}",
                    lambda x=x, residual=residual, channel=channel: add_bias_library.in_kernel(
                        x, residual, channel, channel
                    ),
                )
        for D, k, side, dtype in (
            *itertools.product(
                (32,), (3, 5), (32,), (torch.bfloat16, torch.float16, torch.float32)
            ),
            *((D, k, 32, torch.bfloat16) for D, k in ((16, 5), (24, 5), (64, 5), (32, 7))),
            (32, 5, 7, torch.float16),
        ):
            x = planes(2, 4 * D, side, side, last=last).to(dtype)
            weights = planes(4 * D, 1, k, k).to(dtype), None, planes(4 * D, D, 1, 1).to(dtype), None
            yield (
                f"separable_conv {D} {k} {side} {last} {dtype}",
                partial(separable_conv_library.in_kernel, x, *weights),
            )
    for D in (320, 640, 1280):
        x, channel = planes(2, 256, D), planes(D)
        yield f"geglu {D}", lambda x=x: geglu_library.in_kernel(x)
        wide = planes(2, 256, 2 * D)
        yield f"gradient of geglu {D}", partial(geglu_library.backward_in_kernel, x, wide)
        yield (
            f"layer_norm {D}",
            lambda x=x, channel=channel: norm_library.plain_in_kernel(x, channel, channel, 1e-5),
        )
        yield (
            f"layer_norm {D} of float32",
            partial(
                norm_library.plain_in_kernel,
                x.float(),
                channel.float(),
                channel.float(),
                1e-5,
                torch.bfloat16,
            ),
        )
        for name, kept in (("", x), (" of float32", x.float())):
            yield (
                f"gradient of layer_norm {D}{name}",
                partial(
                    norm_library.plain_backward_in_kernel,
                    *(x, kept, channel, channel, 1e-5, [True, False, False]),
                ),
            )
        # Of queries and of keys, side by side.
        pair = planes(256, 2 * D).as_strided((2, 256, D), (D, 2 * D, 1))
        arguments = (pair, planes(2, D), planes(2, D), 1e-5, 0.01)
        yield f"two norms {D}", lambda arguments=arguments: norm_library.in_kernel(*arguments)
        yield (
            f"gradient of two norms {D}",
            lambda arguments=arguments: norm_library.backward_in_kernel(
                torch.zeros_like(arguments[0]), *arguments
            ),
        )
    # In training, as it is and under autocast, which answers in float32 but for linear maps.
    for D in (64, 96, 128, 512, 768):
        x, weight = planes(64, 784, D), planes(D)
        for kind, dy, kept in (
            ("bfloat16", x, weight),
            ("autocast", x.float(), weight.float()),
            ("for maps", x, weight.float()),
            ("float32", x.float(), weight.float()),
        ):
            read = x.float() if kind == "float32" else x
            yield (
                f"all gradients of layer_norm {D} {kind}",
                partial(
                    norm_library.plain_backward_in_kernel,
                    *(dy, read, kept, kept, 1e-5, [True] * 3),
                ),
            )
    # VSSD's, whose parts of projections are views.
    for (D, heads), kind in itertools.product(
        ((96, 2), (128, 2), (512, 8), (768, 12)), ("bfloat16", "autocast", "float32")
    ):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        kept = torch.bfloat16 if kind == "bfloat16" else torch.float32
        x, v, gate = (
            torch.zeros(64, 784, width, dtype=dtype)[..., :D] for width in (D, D + 128, 3 * D + 136)
        )
        others = [torch.zeros(n, dtype=kept) for n in (heads, D, D)]
        arguments = (x, v, gate, *others, 1e-5)
        yield f"gated_norm {D} {kind}", partial(gated_norm_library.in_kernel, *arguments)
        yield (
            f"gradients of gated_norm {D} {kind}",
            partial(gated_norm_library.backward_in_kernel, x, *arguments),
        )
    for D in (512, 2240):
        x, channel = planes(2, 256, D), planes(D)
        for name, weight in (("", channel), (" of float32 weights", channel.float())):
            yield (
                f"rms_norm {D}{name}",
                partial(rms_norm_library.in_kernel, x, weight, weight, 1e-5, weight.dtype),
            )
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
        for name, more in (("put", (None, False)), ("sum", (y, False)), ("add", (None, True))):
            yield f"{name} {C} {dtype}", partial(parts.put, place, x, *more)
    # Local position encodings beside values that are a part of a projection.
    for C, side, k in ((96, 56, 5), (64, 56, 3), (384, 14, 3)):
        for dtype in (torch.bfloat16, torch.float32):
            x = planes(64, side, side, 3 * C).to(dtype)[..., 2 * C :]
            y, taps, bias = planes(64, side, side, C).to(dtype), planes(C, 1, k, k), planes(C)
            yield (
                f"depthwise_conv {C} {k} {dtype}",
                partial(depthwise_conv_library.in_kernel, x, taps, bias, y, None, *[False] * 3),
            )
            yield (
                f"depthwise_conv with a gate {C} {k} {dtype}",
                partial(depthwise_conv_library.in_kernel, x, taps, bias, y, x, *[False] * 3),
            )
            yield (
                f"gradient of depthwise_conv {C} {k} {dtype}",
                partial(
                    depthwise_conv_library.backward_in_kernel,
                    *(y, x, taps, bias, False, False, False, [True] * 3),
                ),
            )
            # f is GELU, act is SiLU.
            yield (
                f"curved depthwise_conv {C} {k} {dtype}",
                partial(depthwise_conv_library.in_kernel, x, taps, bias, None, None, *[True] * 3),
            )
            yield (
                f"gradient of curved depthwise_conv {C} {k} {dtype}",
                partial(
                    depthwise_conv_library.backward_in_kernel,
                    *(y, x, taps, bias, True, True, True, [True] * 3),
                ),
            )
    # Sana's, SanaVideo's and DC-AE's hidden layers.
    for shape in ((2, 32, 32, 5600), (1, 30, 52, 6720), (1, 128, 128, 2048)):
        B, H, W, C = shape
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            h, dy = planes(B, H, W, 2 * C).to(dtype), planes(B, H, W, C).to(dtype)
            weights = planes(2 * C, 1, 3, 3).to(dtype), planes(2 * C).to(dtype)
            yield f"gated_conv {C} {dtype}", partial(gated_conv_library.in_kernel, h, *weights)
            # Under autocast.
            wide = [x.float() for x in weights]
            yield (
                f"gradient of gated_conv {C} {dtype}",
                partial(gated_conv_backward_library.in_kernel, dy, h, *wide, [True] * 3),
            )
    yield from signed_maps()
    yield from magnitudes()
    yield from windows()


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


def carried(ttir: str) -> list[int]:
    """How many values each loop takes from one round to the next."""
    return [values.count("=") for values in re.findall(r"scf\.for .* iter_args\((.*?)\) ->", ttir)]


def main() -> None:
    recorded: list[tuple] = []
    Launch.__call__ = lambda launch, *tensors: recorded.append((launch, tensors))
    found: dict[str, dict] = {}
    compiled: dict[str, dict] = {}
    for name, call in calls():
        recorded.clear()
        call()
        for launch, tensors in recorded:
            arguments = Arguments.of(launch, tensors)
            key = repr((launch.kernel.__name__, arguments, launch.options))
            if key not in compiled:
                binary = compile_sm_90(launch, arguments)
                compiled[key] = {
                    "accesses": accesses(binary.asm["ptx"], arguments.pointers),
                    "carried": carried(binary.asm["ttir"]),
                    **resources(binary.asm["cubin"]),
                }
            found[f"{name}: {launch.kernel.__name__}"] = compiled[key]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
