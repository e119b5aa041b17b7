"""As `sm_90.py`, of the kernels around attention: norms, activations and sums of residual blocks.

A script that prints, for each kernel of each case, the bytes of each access by tensor, and what the
kernel takes of a multiprocessor.
"""

import itertools
import json
import re
from functools import partial

import torch
from sm_90 import Arguments, accesses, compile_sm_90, resources
from sm_90_tokens import FORMATS, of_tokens, planes

from fbila.ops import (
    add_bias_library,
    depthwise_conv_library,
    gated_conv_backward_library,
    gated_conv_library,
    gated_norm_library,
    geglu_library,
    group_norm_backward_library,
    group_norm_library,
    norm_library,
    rms_norm_library,
    separable_conv_library,
)
from fbila.ops.kernels.launch import Launch


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
    yield from of_tokens()


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
