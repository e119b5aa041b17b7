"""One call for every kernel around attention, small enough for a sanitizer to watch.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
    python tests/ops/every_block_kernel.py [pictures] [rows] [heads] [windows]
"""

import itertools
import sys

import torch

from fbila.ops import group_norm_library
from fbila.ops import linear as linear_module
from fbila.ops.add_bias_library import add_bias
from fbila.ops.depthwise_conv_library import depthwise_conv
from fbila.ops.gated_conv_library import gated_depthwise_conv
from fbila.ops.gated_norm_library import gated_norm
from fbila.ops.geglu_library import geglu
from fbila.ops.layer_scale import add_scaled
from fbila.ops.linear import linear
from fbila.ops.lite_mla_library import lite_mla
from fbila.ops.magnitude import with_magnitude
from fbila.ops.norm_library import layer_norm, layer_norm_leaky_relu
from fbila.ops.parts import put
from fbila.ops.rms_norm_library import rms_norm
from fbila.ops.rotary import Rotary
from fbila.ops.rotated_parts import rotated_parts
from fbila.ops.separable_conv_library import separable_conv2d
from fbila.ops.signed_map_library import signed_map
from fbila.ops.silu_gate_library import silu_gate
from fbila.ops.window_attention_library import window_attention

# Kernels for small inputs as well.
linear_module.FEWEST = 0
FORMATS = (torch.contiguous_format, torch.channels_last)


def pictures(dtype: torch.dtype):
    """(name, result) of kernels of pictures: a short group, a long one, and odd lengths."""
    for (C, side), last in itertools.product(((320, 8), (320, 96), (60, 7)), FORMATS):
        x = torch.randn(2, C, side, side, device="cuda").to(dtype, memory_format=last)
        shift = torch.randn(2, C, device="cuda", dtype=dtype)
        bias = torch.randn(C, device="cuda", dtype=dtype)
        name = f"{C} x {side} {str(last)[6:]}"
        for to_last in (False, True):
            yield (
                f"group_norm {name}",
                group_norm_library.group_norm(x, shift, bias, bias, bias, 20, 1e-5, True, to_last),
            )
        for other in FORMATS:
            residual = x.contiguous(memory_format=other)
            yield f"add_bias {name}", add_bias(x, residual, bias, bias)
        leaves = (x.requires_grad_(), shift.requires_grad_())
        for to_last in (False, True):
            y = group_norm_library.group_norm(x, shift, bias, bias, bias, 20, 1e-5, True, to_last)
            for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y)):
                yield f"gradient of group_norm {name}", gradient
        x = x.detach()
        if last is torch.channels_last:
            taps = torch.randn(C, 1, 3, 3, device="cuda", dtype=dtype)
            leaves = [t.detach().requires_grad_() for t in (x.permute(0, 2, 3, 1), taps, bias)]
            y = gated_depthwise_conv(*leaves)
            yield f"gated_conv {name}", y
            # Sums over all pixels have to stay below 65504.
            for gradient in torch.autograd.grad(y, leaves, torch.full_like(y, 1 / 64)):
                yield f"gradient of gated_conv {name}", gradient
            for side in (3, 5):
                taps = torch.randn(C, 1, side, side, device="cuda", dtype=dtype)
                leaves = [t.detach().requires_grad_() for t in (leaves[0], taps, bias)]
                leaves.append(leaves[0].detach().requires_grad_())
                y = depthwise_conv(*leaves, leaves[3])
                yield f"depthwise_conv {side} with an addend and a gate {name}", y
                y = depthwise_conv(*leaves[:3], gate=leaves[3], residual=True, gelu=True, silu=True)
                yield f"depthwise_conv {side} {name}", y
                for gradient in torch.autograd.grad(y, leaves, torch.full_like(y, 1 / 64)):
                    yield f"gradient of depthwise_conv {side} {name}", gradient
        yield f"in place {name}", group_norm_library.group_norm_(x, bias, bias, 20, 1e-5)
        taps = torch.randn(C, 1, 5, 5, device="cuda", dtype=dtype)
        matrices = torch.randn(C, 20, 1, 1, device="cuda", dtype=dtype)
        yield f"separable_conv {name}", separable_conv2d(x, taps, bias, matrices, bias)
        shapes = [(96, C, 1, 1), (96, 1, 5, 5), (96, 16, 1, 1), (C, 64, 1, 1)]
        weights = [torch.randn(shape, device="cuda", dtype=dtype) / 16 for shape in shapes]
        leaves = [t.requires_grad_() for t in (x, *weights)]
        biased = [t for weight in weights for t in (weight, None)]
        with torch.no_grad():
            yield f"lite_mla alone {name}", lite_mla(x, biased, 16, 1e-5)
        y = lite_mla(x, biased, 16, 1e-5)
        yield f"lite_mla {name}", y
        for gradient in torch.autograd.grad(y, leaves, torch.full_like(y, 1 / 64)):
            yield f"gradient of lite_mla {name}", gradient


def rows(dtype: torch.dtype):
    """(name, result) of kernels of rows."""
    for D in (320, 37):
        x = torch.randn(300, 2 * D, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(2, D, device="cuda", requires_grad=True)
        with torch.no_grad():
            yield f"geglu {D}", geglu(x)
            yield f"layer_norm {D}", layer_norm(x, None, None, 1e-5)
            yield f"rms_norm {D}", rms_norm(x[:, :D], weight[0], weight[1], 1e-5)
        for function, y in (
            ("geglu", geglu(x)),
            ("layer_norm", layer_norm(x, None, None, 1e-5)),
        ):
            (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
            yield f"gradient of {function} {D}", gradient
        for kind in (torch.float32, dtype):
            y = layer_norm(x[:, :D], weight[0], weight[1], 1e-5, kind)
            yield f"layer_norm {D} {kind}", y
            for gradient in torch.autograd.grad(y, (x, weight), torch.full_like(y, 1 / 64)):
                yield f"gradients of layer_norm {D} {kind}", gradient
        scale = torch.randn(1, device="cuda", requires_grad=True)
        y = gated_norm(x[:, :D], x[:, D:], x[:, :D], scale, weight[0], weight[1], 1e-5)
        yield f"gated_norm {D}", y
        for gradient in torch.autograd.grad(y, (x, scale, weight), torch.full_like(y, 1 / 64)):
            yield f"gradients of gated_norm {D}", gradient
        x_, g = (t.detach().requires_grad_() for t in x.chunk(2, 1))
        y = silu_gate(x_, g)
        yield f"silu_gate {D}", y
        for gradient in torch.autograd.grad(y, (x_, g), torch.ones_like(y)):
            yield f"gradients of silu_gate {D}", gradient
        for kind in (torch.float32, dtype):
            y = add_scaled(x_.to(kind), weight[0], g)
            yield f"add_scaled {D} {kind}", y
            for gradient in torch.autograd.grad(y, (x_, weight, g), torch.full_like(y, 1 / 64)):
                yield f"gradients of add_scaled {D} {kind}", gradient
        leaves = [torch.randn(n, device="cuda").to(dtype).requires_grad_() for n in (D * D, D)]
        y = linear(x_, leaves[0].view(D, D), leaves[1], gelu=True)
        for gradient in torch.autograd.grad(y, (x_, *leaves), torch.full_like(y, 1 / 64)):
            yield f"gradients of linear {D}", gradient
        y = layer_norm_leaky_relu(x.unflatten(1, (2, D)).transpose(0, 1), weight, weight, 1e-5, 0.1)
        yield f"norm with activation {D}", y
        for gradient in torch.autograd.grad(y, (x, weight), torch.ones_like(y)):
            yield f"its gradients {D}", gradient


def heads(dtype: torch.dtype):
    """(name, result) of kernels of queries and keys: tokens and channels that fill no tile."""
    for N, d in ((300, 32), (49, 9)):
        packed = torch.randn(2, N, 4, 3, d, device="cuda", dtype=dtype)
        x = packed[:, :, 1].transpose(1, 2).requires_grad_()
        positions = torch.randn(N, 3, d, device="cuda", requires_grad=True)
        table = (1 + torch.rand(4, 3, d, device="cuda")).requires_grad_()
        for kind, leaves in (("power", (x, positions, table)), ("expm1", (x, table))):
            rows = table[:2] if kind == "power" else table
            results = signed_map(x, positions if kind == "power" else None, rows, kind, True)
            # Sums over all tokens have to stay below 65504.
            douts = [torch.full_like(y, 1 / 64) for y in results]
            for part in (*results, *torch.autograd.grad(results, leaves, douts)):
                yield f"signed_map {kind} {N} {d}", part
    for N, d in ((49, 64), (33, 20), (1, 4)):
        whole = torch.randn(2, N, 4, 3, d, device="cuda").to(dtype).requires_grad_()
        angles = torch.randn(N, d // 2, device="cuda")
        found = rotated_parts(whole, Rotary(angles.cos(), angles.sin()))
        for part in (*found, *torch.autograd.grad(found, whole, [p.detach() for p in found])):
            yield f"rotated_parts {N} {d}", part
    # In each order of heads, tokens and channels in memory.
    for N, d, axes in itertools.product(
        (300, 49), (64, 20), ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2))
    ):
        leaves = [
            torch.randn([(2, 3, N, width)[axis] for axis in axes], device="cuda", dtype=dtype)
            .permute(axes)
            .requires_grad_()
            for width in (d, 1, d)
        ]
        y = with_magnitude(*leaves, 1e-6)
        for part in (y, *torch.autograd.grad(y, leaves, torch.full_like(y, 1 / 64))):
            yield f"magnitude {N} {d}", part
    for C, whole in ((96, 288), (50, 131), (2, 18)):
        place, x, y = (torch.randn(333, width, device="cuda").to(dtype) for width in (whole, C, C))
        for other in (None, y):
            put(place[:, :C], x, other)
            yield f"put {C}", place


def windows(dtype: torch.dtype):
    """(name, result) of attention in windows, whole ones and others, shifted and not."""
    for (H, W), d, shift in (((14, 14), 32, 0), ((9, 17), 32, 3), ((3, 2), 9, 3)):
        qkv = torch.randn(3, H, W, 6 * d, device="cuda", dtype=dtype, requires_grad=True)
        table = torch.randn(169, 2, device="cuda", requires_grad=True)
        fill = torch.randn(6 * d, device="cuda", requires_grad=True)
        for leaves in ((qkv, table, fill), (qkv, table)):
            y = window_attention(qkv, table, (*leaves, None)[2], (7, 7), (shift, shift))
            yield f"window_attention {H} {d}", y
            for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y)):
                yield f"gradient of window_attention {H} {d}", gradient


PARTS = {"pictures": pictures, "rows": rows, "heads": heads, "windows": windows}

if __name__ == "__main__":
    parts = [PARTS[name] for name in sys.argv[1:] or PARTS]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for name, result in itertools.chain(*(part(dtype) for part in parts)):
            assert result.isfinite().all(), name
            print(dtype, name, flush=True)
