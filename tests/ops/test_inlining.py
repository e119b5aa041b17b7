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
def on_hopper():
    return graphs(HOPPER)


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


@pytest.mark.parametrize("case", ["silu_gate", "depthwise_conv", "with all"])
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
    assert on_hopper["nothing"] == [["fbila.linear_attn.default"]]


def test_with_little_shared_memory_ops_stay():
    for parts in graphs(HOPPER - 1).values():
        assert len(parts) == 1 and parts[0][0].startswith("fbila.")


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
