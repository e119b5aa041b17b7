"""A compiler's graph has kernels themselves where it can, each writing to its result alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CUDA
from torch._inductor.utils import run_and_get_code

from fbila import linear_attn
from fbila.layers import FocusedLinearAttention
from fbila.ops.norm_library import layer_norm_leaky_relu

HOPPER = 227 * 1024


def graphs(shared_memory: int) -> dict:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("inlined.py")
    done = subprocess.run(
        [sys.executable, script, str(shared_memory)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def both_on_hopper():
    return graphs(HOPPER)


@pytest.fixture(scope="module")
def on_hopper(both_on_hopper):
    return both_on_hopper["inference"]


@pytest.fixture(scope="module")
def in_training(both_on_hopper):
    return both_on_hopper["training"]


@pytest.mark.parametrize("D", [8, 40, 160])
def test_long_calls_are_two_or_three_kernels(D, on_hopper):
    state, *sums, output = on_hopper[f"{D} 4096"]
    assert state == ["kernel", "partial"]
    assert sums in ([], [["kernel", "state"]])
    assert output == ["kernel", "o"]


def test_short_calls_of_narrow_heads_are_one(on_hopper):
    assert on_hopper["40 64"] == [["kernel", "o"]]


def test_norms_are_kernels(on_hopper):
    assert on_hopper["norm"] == [["kernel", "o"]]


@pytest.mark.parametrize("case", ["silu_gate", "depthwise_conv", "with all", "windows"])
def test_what_is_around_attention_is_a_kernel(case, on_hopper):
    assert on_hopper[case] == [["kernel", "y"]]


def test_maps_and_focused_attention_are_kernels(on_hopper):
    ((kind, *written),) = on_hopper["signed_map"]
    assert kind == "kernel" and written == ["y"]
    *rows, state, total, output = on_hopper["focused"]
    assert rows == 2 * [["kernel", "rows"]]
    assert [state, total, output] == [["kernel", "partial"], ["kernel", "state"], ["kernel", "o"]]


@pytest.mark.parametrize("case", ["float64", "far", "symbols", "exported"])
def test_elsewhere_the_op_stays(case, on_hopper):
    assert on_hopper[case] == [["fbila.linear_attn.default"]]


def test_without_tokens_nothing_is_launched(on_hopper):
    assert on_hopper["nothing"] == []


# What the kernels of a training step write, forward and backward, and the shapes of what is kept
# for the gradients, of q, k and v (Q) or a grid (G) and of what is beside them.
Q, G, STATE, INVERSE = [2, 8, 3136, 32], [2, 56, 56, 128], [16, 1056], [2, 8, 3136]
FORWARD = [["partial"], ["state"], ["o", "inverse"]]
BACKWARD = [["dq", "partial"], ["state"], ["dk", "dv"]]
SUMS = [["sums"], ["dtaps", "dbias"]]
TRAINING = {
    "focused": (
        [["rows"], ["rows"], *FORWARD],
        [
            ["dq", "dweight", "partial"],
            ["state"],
            ["dk", "dv", "dweight"],
            ["df", "partial"],
            ["df", "partial"],
        ],
        # The scale and what it becomes, and two numbers more than the inverse for a token.
        [Q, Q, Q, [8, 32], [8, 32], [2, 3, 3136], [2, 3, 3136], STATE, INVERSE],
    ),
    # The same kernels, and the positions.
    "at positions": (
        [["rows"], ["rows"], *FORWARD],
        [
            ["dq", "dweight", "partial"],
            ["state"],
            ["dk", "dv", "dweight"],
            ["df", "partial"],
            ["df", "partial"],
        ],
        [Q, Q, Q, [8, 32], [8, 32], [2, 3, 3136], [2, 3, 3136], [3136, 8, 32], STATE, INVERSE],
    ),
    "long": (FORWARD, BACKWARD, [Q, Q, Q, STATE, INVERSE]),
    "short": (
        [["o", "state", "inverse"]],
        [["dq", "partial"], ["dk", "dv"]],
        [[2, 8, 49, 32]] * 3 + [STATE, [2, 8, 49]],
    ),
    "simple": ([["partial"], ["state"], ["o"]], BACKWARD, [Q, Q, Q, STATE]),
    "weighed": (
        FORWARD,
        [["dq", "partial"], ["state"], ["dk", "dv", "dweight"]],
        [Q, Q, Q, INVERSE, STATE, INVERSE],
    ),
    # The state as it was given, and the number of keys.
    "in halves": (FORWARD, BACKWARD, [Q, Q, Q, STATE, [2], INVERSE]),
    # The state about the mean of the values, and that.
    "centred": (
        [["partial"], ["state", "mean", "centre"], ["o"]],
        [["dq", "partial"], ["state"], ["operand", "share"], ["dk", "dv"]],
        [Q, Q, Q, STATE, [16, 32]],
    ),
    "centred short": (
        [["o", "state", "mean", "centre"]],
        [["dq", "partial"], ["operand", "share"], ["dk", "dv"]],
        [[2, 8, 49, 32]] * 3 + [STATE, [16, 32]],
    ),
    "depthwise_conv": ([["y"]], [["y"], *SUMS], [G, [128, 1, 5, 5]]),
    "with silu": ([["y"]], [["y"], ["y"], *SUMS], [G, [128, 1, 5, 5], [128]]),
    "with all": ([["y"]], [["y"], ["y"], *SUMS], [G, [32, 1, 5, 5], [32], G, G]),
    "power": ([["y", "opposite"]], [["dx", "sums"]], [Q, [3136, 8, 32], [2, 8, 32]]),
    "expm1": ([["y"]], [["dx", "sums"]], [Q, [2, 8, 32]]),
    "windows": (
        [["y"]],
        [["dqkv", "sums"], ["dtable"]],
        [[2, 14, 14, 288], [169, 3], [288]],
    ),
    "windows beyond": (
        [["y"]],
        [["dqkv", "sums", "beyond"], ["dtable"]],
        [[2, 9, 9, 288], [169, 3], [288]],
    ),
    "silu_gate": ([["y"]], [["dx", "dg"]], [G, G]),
}


@pytest.mark.parametrize("case", TRAINING)
def test_training_steps_are_kernels(case, in_training):
    forward, backward, _ = TRAINING[case]
    assert in_training[case]["forward"] == [["kernel", *written] for written in forward]
    assert in_training[case]["backward"] == [["kernel", *written] for written in backward]


@pytest.mark.parametrize("case", TRAINING)
def test_graphs_keep_what_eager_mode_keeps(case, in_training):
    kept = [shape for shape in in_training[case]["kept"] if 0 not in shape]
    assert kept == sorted(TRAINING[case][2])


def test_the_ops_of_float64_stay_in_training(in_training):
    assert in_training["float64"]["forward"] == [["fbila.linear_attn_forward.default"]]
    assert in_training["float64"]["backward"] == [["fbila.linear_attn_backward.default"]]


def test_threads_that_share_a_sum_make_it_alike(both_on_hopper):
    assert both_on_hopper["fused"] == 0


def test_with_little_shared_memory_ops_stay():
    found = graphs(HOPPER - 1)
    steps = [step[name] for step in found["training"].values() for name in ("forward", "backward")]
    for parts in [*found["inference"].values(), *steps]:
        assert parts and all(name.startswith("fbila.") for name, *_ in parts)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(2, 8, 4096, 40), (2, 8, 1024, 80), (1, 3, 64, 32), (2, 1, 1, 8)]
)
def test_inductor_launches_them(dtype, shape):
    torch._dynamo.reset()
    B, H, N, D = shape
    packed = torch.randn(B, N, 3 * H * D, device="cuda", dtype=dtype)
    weight, bias = torch.randn(2, 1, 3 * H * D, device="cuda", dtype=dtype)

    def both(x):
        x = layer_norm_leaky_relu(x.view(1, -1, x.shape[-1]), weight, bias, 1e-5, 0.01).view_as(x)
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in x.chunk(3, -1))
        return linear_attn(q, k, v, feature_map="elu1", eps=1e-4).transpose(1, 2).flatten(2)

    with torch.no_grad():
        expected = both(packed)
        actual, (code, *_) = run_and_get_code(torch.compile(both, fullgraph=True), packed)
    # Inductor multiplies and adds in another order of instructions.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    call = code[code.index("def call") :]
    assert "norm_kernel" in call and "torch.ops.fbila" not in call


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_inductor_trains_by_them(dtype, tolerance):
    torch._dynamo.reset()
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(64, device="cuda")
    attn = FocusedLinearAttention(64, 2, grid_size=28, device="cuda")
    torch.nn.init.normal_(attn.scale)
    x = torch.randn(2, 784, 64, device="cuda", requires_grad=True)
    dy = torch.randn(2, 784, 64, device="cuda")
    leaves = [x, *norm.parameters(), *attn.parameters()]

    def block(x):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return x + attn(norm(x), 28, 28)

    def step(block):
        y = block(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    expected = step(block)
    actual, codes = run_and_get_code(step, torch.compile(block, fullgraph=True))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * e.abs().max().item())
    assert any("grad_focus_kernel" in code for code in codes)
    assert not any("torch.ops.fbila" in code for code in codes)
