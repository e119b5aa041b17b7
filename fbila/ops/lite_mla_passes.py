"""What LiteMLA computes on a GPU: for inference, for training, and its gradient.

For training the scales are tokens in one tensor t `(B, N, scales, 3 C)`, whichever order x has,
since that is what the gradients of depthwise convolutions read. Attention takes all of them at
once, and its gradient is written as one tensor of the same form.

Weights are a list: those of the projection `qkv`, of the depthwise and the pointwise convolution of
each further scale, and of `proj`, each followed by its bias or None.
"""

from typing import Any

import torch
from torch import Tensor

from . import library, separable_conv_library
from .depthwise_conv_library import KERNEL_SIZES, backward_in_kernel, run
from .products import multiply, multiply_groups, weight_gradient, weight_gradient_of_groups
from .separable_conv_library import MAX_GROUP, has_channels_last
from .tensor_checks import MAX_HEAD_DIM

# Of Tensor | None.
Weights = list[Any]


def scales_of(weights: Weights) -> list[Weights]:
    """Depthwise weight and bias, pointwise weight and bias of each scale but the first."""
    return [weights[i : i + 4] for i in range(2, len(weights) - 2, 4)]


def check(x: Tensor, weights: Weights, dim: int) -> None:
    """Raises ValueError for what kernels would read wrongly."""
    wide, scales = weights[0].shape[0], scales_of(weights)
    if len(weights) % 4 or not 0 < dim <= MAX_HEAD_DIM or wide % (3 * dim):
        raise ValueError(
            f"There must be 4 weights and biases for each scale, got {len(weights)}, and of qkv "
            f"3 * dim rows for each head, got {wide} for dim={dim}."
        )
    shapes = [(wide, x.shape[1], 1, 1)]
    for near, *_ in scales:
        k = near.shape[-1]
        if k not in KERNEL_SIZES:
            raise ValueError(f"Kernels are of {KERNEL_SIZES} pixels, got {k}.")
        shapes += [(wide, 1, k, k), (wide, dim, 1, 1)]
    shapes.append((weights[-2].shape[0], wide // 3 * (1 + len(scales)), 1, 1))
    for i, shape in enumerate(shapes):
        weight, bias = weights[2 * i : 2 * i + 2]
        if weight.shape != shape or (bias is not None and bias.shape != shape[:1]):
            raise ValueError(
                f"Weight {i} and its bias must be {list(shape)} and {list(shape[:1])}, got "
                f"{list(weight.shape)} and {None if bias is None else list(bias.shape)}."
            )
    for weight in weights:
        if weight is not None and (weight.dtype != x.dtype or weight.device != x.device):
            raise ValueError(
                f"Weights must be {x.dtype} on {x.device} as x is, got {weight.dtype} on "
                f"{weight.device}."
            )


def empty_picture(x: Tensor, channels: int) -> Tensor:
    """`(B, channels, H, W)`, uninitialised, in channels_last where the channels of x lie so."""
    B, _, H, W = x.shape
    if has_channels_last(x):
        return x.new_empty(B, H, W, channels).permute(0, 3, 1, 2)
    return x.new_empty(B, channels, H, W)


def tokens_of(x: Tensor) -> Tensor:
    """`(B, C, H, W)` -> `(B, N, C)`, a view of a picture in either order."""
    return x.flatten(2).mT


def matrix(weight: Tensor) -> Tensor:
    """`(I, O)` of a 1 x 1 convolution."""
    return weight.flatten(1).mT


def groups(weight: Tensor) -> Tensor:
    """`(G, D, D)` of a grouped 1 x 1 convolution, output channels first."""
    return weight.reshape(-1, weight.shape[1], weight.shape[1])


def heads_of(t: Tensor, dim: int) -> Any:
    """q, k and v `(B, heads, N, dim)` of all scales of t `(B, N, scales, 3 C)`, views."""
    B, N, scales, wide = t.shape
    return t.view(B, N, scales * wide // (3 * dim), 3, dim).permute(3, 0, 2, 1, 4).unbind()


def empty_kept(x: Tensor, weights: Weights, dim: int) -> tuple[Tensor, Tensor]:
    """t, and what depthwise convolutions make `(scales - 1, B, H, W, 3 C)`, uninitialised."""
    B, _, H, W = x.shape
    wide, scales = weights[0].shape[0], len(scales_of(weights))
    return x.new_empty(B, H * W, 1 + scales, wide), x.new_empty(scales, B, H, W, wide)


def forward(
    x: Tensor, weights: Weights, dim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y and what the gradient reads: t, z, o `(B, heads, N, dim)`, the state and 1 / denominator.

    z is what depthwise convolutions make.
    """
    check(x, weights, dim)
    y = empty_picture(x, weights[-2].shape[0])
    t, z = empty_kept(x, weights, dim)
    if y.numel():
        own = t[:, :, 0]
        multiply(tokens_of(x), matrix(weights[0]), weights[1], own)
        scales = t.flatten(0, 1).unbind(1)[1:]
        grid = own.unflatten(1, x.shape[2:])
        for (near, near_bias, mix, mix_bias), local, scale in zip(
            scales_of(weights), z, scales, strict=True
        ):
            run(local, grid, near, near_bias, None)
            multiply_groups(local.flatten(0, 2), groups(mix).mT, mix_bias, scale)
    q, k, v = heads_of(t, dim)
    o, state, inverse = library.forward(
        q, k, v, None, None, None, None, None, "relu", "sum", "none", 1.0, eps
    )  # fmt: skip
    if y.numel():
        multiply(_rows(o), matrix(weights[-2]), weights[-1], tokens_of(y))
    return y, t, z, o, state, inverse


def _rows(o: Tensor) -> Tensor:
    """`(B, heads, N, dim)` -> `(B, N, heads * dim)`, a view of what is token-major."""
    return o.transpose(1, 2).flatten(2)


def inference(x: Tensor, weights: Weights, dim: int, eps: float) -> Tensor:
    """y alone, and nothing kept."""
    if dim > MAX_GROUP:
        return forward(x, weights, dim, eps)[0]
    check(x, weights, dim)
    y = empty_picture(x, weights[-2].shape[0])
    if y.numel():
        mix = _mix_tokens if has_channels_last(x) else _mix_picture
        multiply(mix(x, weights, dim, eps), matrix(weights[-2]), weights[-1], tokens_of(y))
    return y


def _mix_picture(x: Tensor, weights: Weights, dim: int, eps: float) -> Tensor:
    """The heads of all scales `(B, N, scales * C)`, by way of one NCHW picture of all scales."""
    B, _, H, W = x.shape
    wide, scales = weights[0].shape[0], scales_of(weights)
    pictures = x.new_empty(B, (1 + len(scales)) * wide, H, W)
    own, *others = pictures.split(wide, 1)
    multiply(tokens_of(x), matrix(weights[0]), weights[1], tokens_of(own))
    for picture, scale in zip(others, scales, strict=True):
        separable_conv_library.fill(picture, own, *scale)
    q, k, v = pictures.view(B, -1, 3, dim, H * W).mT.unbind(2)
    o = library.inference(
        q, k, v, None, None, None, None, None, "relu", "sum", "none", 1.0, eps
    )  # fmt: skip
    return o.transpose(1, 2).flatten(2)


def _mix_tokens(x: Tensor, weights: Weights, dim: int, eps: float) -> Tensor:
    """The same in channels_last, where each scale is a picture by itself."""
    from .kernels.side import PLAIN

    B, _, H, W = x.shape
    wide, scales = weights[0].shape[0], scales_of(weights)
    own = x.new_empty(B, H, W, wide).permute(0, 3, 1, 2)
    multiply(tokens_of(x), matrix(weights[0]), weights[1], tokens_of(own))
    o = x.new_empty(B, H * W, 1 + len(scales), wide // (3 * dim), dim)
    for i, scale in enumerate([None, *scales]):
        picture = own if scale is None else separable_conv_library.in_kernel(own, *scale)
        q, k, v = heads_of(tokens_of(picture).unsqueeze(2), dim)
        library.forward_of(
            q, k, v, PLAIN, PLAIN, None, o[:, :, i].transpose(1, 2), None, "relu", "sum", 1.0, eps
        )
    return o.flatten(2)


def empty_gradients(x: Tensor, weights: Weights, needed: list[bool]) -> list[Tensor]:
    """Of x and of the weights, uninitialised; without elements where nobody needs them."""
    found = [empty_picture(x, x.shape[1]) if needed[0] else x.new_empty(0)]
    for weight, wanted in zip(weights, needed[1:], strict=True):
        found.append(x.new_empty(weight.shape if wanted and weight is not None else 0))
    return found


def backward(
    dy: Tensor,
    x: Tensor,
    weights: Weights,
    t: Tensor,
    z: Tensor,
    o: Tensor,
    state: Tensor,
    inverse: Tensor,
    dim: int,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients of x and of the weights; those that nobody needs are empty."""
    from .kernels.side import PLAIN

    if not dy.numel():
        return [gradient.zero_() for gradient in empty_gradients(x, weights, needed)]
    want_x, *want = needed
    dx, *dweights = empty_gradients(x, weights, [want_x, *[False] * len(want)])
    dy, rows = tokens_of(dy), _rows(o)
    if want[-2]:
        dweights[-2] = weight_gradient(dy, rows).view(weights[-2].shape)
    if want[-1]:
        dweights[-1] = dy.sum((0, 1))
    if not (want_x or any(want[:-2])):
        return [dx, *dweights]
    do = dy.new_empty(rows.shape)
    multiply(dy, weights[-2].flatten(1), None, do)
    dt = torch.empty_like(t)
    (q, k, v), (dq, dk, dv) = heads_of(t, dim), heads_of(dt, dim)
    library.backward_of(
        do.unflatten(2, (-1, dim)).transpose(1, 2), q, k, v, PLAIN, PLAIN, None, state, inverse,
        dq, dk, dv, None, "relu", "sum", 1.0, needs_keys=True,
    )  # fmt: skip
    own, *others = dt.unbind(2)
    grid, down = (s.unflatten(1, x.shape[2:]) for s in (t[:, :, 0], own))
    further = want_x or want[0] or want[1]
    for i, scale in enumerate(scales_of(weights)):
        near, near_bias, mix, _ = scale
        first = 2 + 4 * i
        want_near = [False, *want[first : first + 2]]
        if want[first + 2]:
            found = weight_gradient_of_groups(others[i], z[i].flatten(1, 2), dim)
            dweights[first + 2] = found.view(mix.shape)
        if want[first + 3]:
            dweights[first + 3] = others[i].sum((0, 1))
        if not (further or any(want_near)):
            continue
        dz = torch.empty_like(z[i])
        multiply_groups(others[i].flatten(0, 1), groups(mix), None, dz.flatten(0, 2))
        if any(want_near):
            _, *dweights[first : first + 2] = backward_in_kernel(
                dz, grid, near, near_bias, False, False, False, want_near
            )
        if further:
            # Added to what is there.
            total = torch.empty_like(dz)
            run(total, dz, near, None, down, turned=True)
            down = total
    down = down.flatten(1, 2)
    if want[0]:
        dweights[0] = weight_gradient(down, tokens_of(x)).view(weights[0].shape)
    if want[1]:
        dweights[1] = down.sum((0, 1))
    if want_x:
        multiply(down, weights[0].flatten(1), None, tokens_of(dx))
    return [dx, *dweights]
