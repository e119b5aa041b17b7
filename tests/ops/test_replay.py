"""A pass like one before is made by its launches alone; one that differs in anything is not."""

import ctypes

import pytest
import torch
from helpers import CUDA, DEVICE, make_qkv

from fbila.ops import (
    depthwise_conv_library,
    layer_scale,
    library,
    magnitude,
    norm_library,
    replay,
    rotated_parts,
    silu_gate_library,
)
from fbila.ops.kernels.launch import Launch

PLAIN = (False, False, False)


def at(pointer, x):
    """A tensor like x there."""
    if pointer is None or x is None:
        return None
    shape, stride, dtype = x
    numbers = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    memory = (ctypes.c_char * (numbers * dtype.itemsize)).from_address(pointer)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


@pytest.fixture
def programs(monkeypatch):
    """How many programs have run, in a list of one number, from a clean slate.

    Without a GPU the interpreter is started with pointers, as what a GPU has compiled is.
    """
    monkeypatch.setattr(replay, "_PROGRAMS", {})
    ran, call, original = [0], replay.Program.__call__, Launch._launch

    def counted(self, *arguments):
        made = call(self, *arguments)
        ran[0] += made is not None
        return made

    def launch(self, tensors):
        original(self, tensors)
        likes = [None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors]
        aligned = [None if x is None else x.data_ptr() % 16 == 0 for x in tensors]

        def start(*pointers):
            original(self, tuple(map(at, pointers, likes)))

        self.compiled[(-1, *aligned)] = start

    monkeypatch.setattr(replay.Program, "__call__", counted)
    if not CUDA:
        monkeypatch.setattr(replay, "served", lambda x: True)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
        monkeypatch.setattr(Launch, "_launch", launch)
    return ran


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def attention(dtype):
    q, k, v, do = make_qkv((1, 2, 5, 5, 4, 6), dtype)
    table = draw(1, 5, 4, dtype=dtype, seed=7)
    inputs = (q, k, v, None, None, None, table, None)
    return inputs, ("elu1", "mean", "interleaved", 1.0, 1e-6), do


def passes(dtype):
    """Every pass with arguments: functions, and what they are called with."""
    x, addend, gate = (draw(2, 5, 7, 8, dtype=dtype, seed=i) for i in range(3))
    weight, bias = draw(8, 1, 3, 3, dtype=dtype, seed=3), draw(8, dtype=dtype, seed=4)
    conv, norm, silu = depthwise_conv_library, norm_library, silu_gate_library
    tables = draw(5, 4), draw(5, 4, seed=1)
    dots = draw(2, 5, 7, 1, dtype=dtype), draw(2, 5, 1, 8)
    inputs, options, do = attention(dtype)
    _, state, inverse = library.forward.__wrapped__(*inputs, *options)
    return {
        "conv": (conv.in_kernel, (x, weight, bias, addend, gate, *PLAIN)),
        "part": (conv.in_kernel, (draw(2, 5, 7, 24, dtype=dtype)[..., 8:16], weight, None, None,
                                  None, True, True, False)),
        "conv backward": (conv.backward_in_kernel, (gate, x, weight, bias, True, False, True,
                                                    [True, True, True])),
        "some gradients": (conv.backward_in_kernel, (gate, x, weight, bias, *PLAIN,
                                                     [False, True, False])),
        "norm": (norm.plain_in_kernel, (x, bias, bias + 1, 1e-5, torch.float32)),
        "norm backward": (norm.plain_backward_in_kernel, (addend, x, bias, None, 1e-5,
                                                          [True, True, False])),
        "gate": (silu.in_kernel, (x, gate)),
        "gate backward": (silu.backward_in_kernel, (addend, x, gate)),
        "layer scale": (layer_scale.in_kernel, (x, bias, gate)),
        "its gradients": (layer_scale.backward_in_kernel, (x.float(), bias, gate, *[dtype] * 2)),
        "one of them": (layer_scale.backward_in_kernel, (x, None, gate, *[dtype] * 2)),
        "magnitude": (magnitude.in_kernel, (x, *dots, 1e-6)),
        "gradients of magnitude": (magnitude.backward_in_kernel, (gate, x, *dots, 1e-6, 7, True,
                                                                  True)),
        "parts": (rotated_parts.in_kernel, (draw(2, 5, 4, 3, 8, dtype=dtype), *tables)),
        "gradients of parts": (rotated_parts.backward_in_kernel, (
            *(draw(2, 5, 3, 8, dtype=dtype, seed=i) for i in range(4)), *tables)),
        "inference": (library.inference, (*inputs, *options)),
        "forward": (library.forward, (*inputs, *options)),
        "backward": (library.backward, (do, *inputs, state, inverse, *options, [True, True])),
    }  # fmt: skip


def assert_same(run, arguments):
    found, expected = run(*arguments), run.__wrapped__(*arguments)
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert torch.equal(one, other)


def others(arguments, change):
    """The arguments with other tensors in the place of theirs."""
    return [change(x) if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", passes(torch.float32))
def test_it_is_the_pass(name, dtype, programs):
    run, arguments = passes(dtype)[name]
    for times in range(3):
        assert_same(run, arguments)
        assert programs == [times]
        # Of other values, elsewhere.
        arguments = others(arguments, lambda x: (x / 2).as_strided(x.shape, x.stride())
                           if x.is_contiguous() else x)  # fmt: skip


def test_what_differs_is_another_kind(programs):
    x, weight, bias, *more = passes(torch.float32)["conv"][1]
    run = depthwise_conv_library.in_kernel
    addend, gate = more[:2]
    assert_same(run, (x, weight, bias, addend, gate, *PLAIN))
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for arguments in (
        (turned, weight, bias, addend, gate, *PLAIN),
        (x, weight, bias, addend, turned, *PLAIN),
        (x, weight, None, addend, gate, *PLAIN),
        (x, weight, bias, None, gate, *PLAIN),
        (x, weight, bias, addend, None, *PLAIN),
        (x, weight[:4].contiguous(), bias[:4].contiguous(), addend, gate, *PLAIN),
        (x[:1], weight, bias, addend[:1], gate[:1], *PLAIN),
        (x.half(), weight, bias, addend, gate, *PLAIN),
        (x, weight.half(), bias, addend, gate, *PLAIN),
        (x, weight, bias, addend, gate.half(), *PLAIN),
        (x, weight, bias, addend, gate, True, False, False),
        (x, weight, bias, addend, gate, False, False, True),
    ):
        assert_same(run, arguments)
    assert programs == [0]
    assert_same(run, (x, weight, bias, addend, gate, *PLAIN))
    assert programs == [1]


def test_memory_that_is_not_aligned(programs):
    run, (x, weight, bias, addend, gate, *options) = passes(torch.float32)["conv"]
    assert_same(run, (x, weight, bias, addend, gate, *options))
    for i in range(5):
        tensors = [x, weight, bias, addend, gate]
        moved = tensors[i].new_empty(tensors[i].numel() + 1)[1:].view(tensors[i].shape)
        tensors[i] = moved.copy_(tensors[i])
        assert_same(run, (*tensors, *options))
    assert programs == [0]


def test_one_tensor_in_two_places(programs):
    run, (x, weight, bias, addend, gate, *options) = passes(torch.float32)["conv"]
    assert_same(run, (x, weight, bias, gate, gate, *options))
    assert_same(run, (x, weight, bias, addend, gate, *options))
    assert_same(run, (x, weight, bias, x, gate, *options))


def test_what_does_more_than_launch_is_left_alone(programs):
    x, weight, bias, *_ = passes(torch.float32)["conv"][1]
    run = depthwise_conv_library.in_kernel
    planes = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    seven = draw(8, 1, 7, 7)
    for _ in range(2):
        assert_same(run, (planes, weight, bias, None, None, *PLAIN))
        assert_same(run, (x, seven, bias, None, None, *PLAIN))
        assert_same(run, (x[:0], weight, bias, None, None, *PLAIN))
    assert programs == [0] and not any(replay._PROGRAMS.values())


def test_bad_input_still_raises(programs):
    run, (x, weight, bias, addend, gate, *options) = passes(torch.float32)["conv"]
    for _ in range(2):
        run(x, weight, bias, addend, gate, *options)
        with pytest.raises(ValueError, match="addend must have"):
            run(x, weight, bias, addend[:, :4], gate, *options)
        with pytest.raises(ValueError, match="weight must be"):
            run(x, weight[:3], bias, addend, gate, *options)


def test_what_wants_a_gradient_has_one_after_a_call_that_did_not(programs, monkeypatch):
    monkeypatch.setattr(depthwise_conv_library, "direct", lambda *_: True)
    run, (x, weight, bias, *_) = depthwise_conv_library.in_kernel, passes(torch.float32)["conv"][1]
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    dy = draw(*x.shape, seed=9)
    expected = depthwise_conv_library.backward_in_kernel.__wrapped__(
        dy, x, weight, bias, *PLAIN, [True, True, True]
    )
    with torch.no_grad():
        run(*leaves, None, None, *PLAIN)
    for _ in range(2):
        y = torch.ops.fbila.depthwise_conv(*leaves, None, None, *PLAIN)
        for one, other in zip(torch.autograd.grad(y, leaves, dy), expected, strict=True):
            assert torch.equal(one, other)
    assert programs == [3]


def test_what_is_remembered_is_bounded(programs, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 2)
    x = draw(5, 8)
    for n in range(1, 6):
        assert_same(silu_gate_library.in_kernel, (x[:n], 2 * x[:n]))
    assert len(replay._PROGRAMS) == 2


def test_what_is_found_elsewhere_is_not_made(programs):
    x, g = draw(2, 8), draw(2, 8, seed=1)
    kept = g * 2

    @replay.replayed
    def run(x, g):
        return silu_gate_library.in_kernel(x, kept)

    for _ in range(3):
        assert torch.equal(run(x, g), silu_gate_library.in_kernel.__wrapped__(x, kept))
    # The first is watched, and is none.
    assert [key[0] for key, program in replay._PROGRAMS.items() if program is None] == [
        run.__wrapped__
    ]
