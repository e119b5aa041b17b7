"""The kernels as they are compiled for a Hopper GPU: wide accesses, no spills, tensor cores.

No GPU is needed for that; `sm_90.py` compiles what `linear_attn` and `focused_la` launch.
"""

import json
import os
import subprocess
import sys

import pytest
import triton

try:
    from . import sm_90
except ImportError as missing:
    pytest.skip(f"this Triton cannot compile for sm_90: {missing}", allow_module_level=True)

# Two processes compile half of them each.
HALVES = [(32, 40, 160), (64, 80, 128)]
# What a block of threads may have of a Hopper GPU's, in bytes.
SHARED_MEMORY = 227 * 1024
# The stack, in bytes, of the kernels that are known to spill, with the ptxas of Triton 3.9. Others
# differ by some hundred bytes either way.
SPILLS_TRITON = "3.9."
SPILLS = {
    ("state_kernel of k", 80): 48,
    ("grad_feature_kernel of q", 80): 88,
    ("state_kernel of k", 160): 192,
    ("state_kernel of q", 160): 120,
    ("grad_feature_kernel of q", 160): 400,
    ("grad_feature_kernel of k", 160): 488,
}

each_kernel = pytest.mark.parametrize(
    ("layout", "D", "feature_map"),
    [
        (layout, D, feature_map)
        for D in sorted(sum(HALVES, ()))
        for layout in sm_90.layouts(D)
        for feature_map in sm_90.feature_maps(D)
    ],
)


measured = pytest.mark.skipif(
    not triton.__version__.startswith(SPILLS_TRITON) or not sm_90.CUOBJDUMP.exists(),
    reason=f"spills were measured with Triton {SPILLS_TRITON}x and its own cuobjdump",
)


def start(*arguments) -> subprocess.Popen:
    """`sm_90.py` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, sm_90.__file__, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen) -> dict:
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.fixture(scope="module")
def kernels():
    """What `sm_90.examine` says of each kernel, by its name, for each of `each_kernel`."""
    examined = {}
    for half in [start(*half) for half in HALVES]:
        examined |= finish(half)
    return examined


@each_kernel
def test_all_passes_are_seen(layout, D, feature_map, kernels):
    names = kernels[f"{layout} {D} {feature_map}"].keys()
    assert names >= {"state_kernel of k", "output_kernel of q"}
    # Wide heads take two kernels for each half of the backward pass.
    q = names >= {"state_kernel of q", "grad_feature_kernel of q"}
    k = names >= {"output_kernel of k", "grad_feature_kernel of k"}
    assert ("short_kernel of q" in names) == (D <= 64)
    assert q or "grad_query_kernel of q" in names
    assert k or "grad_key_kernel of k" in names


@each_kernel
def test_tiles_are_moved_16_bytes_at_a_time(layout, D, feature_map, kernels):
    for name, kernel in kernels[f"{layout} {D} {feature_map}"].items():
        assert len(kernel["tiles"]) >= 2
        for tensor, sizes in kernel["tiles"].items():
            assert set(sizes) == {16}, f"{name}: {tensor} by {sorted(set(sizes))} bytes"
            assert sum(sizes) >= kernel["share"], f"{name}: {tensor}, {len(sizes)} accesses"


@each_kernel
def test_products_are_on_the_tensor_cores(layout, D, feature_map, kernels):
    for name, kernel in kernels[f"{layout} {D} {feature_map}"].items():
        assert kernel["products"] > 0, name


@each_kernel
def test_shared_memory_suffices(layout, D, feature_map, kernels):
    for name, kernel in kernels[f"{layout} {D} {feature_map}"].items():
        assert kernel["shared"] <= SHARED_MEMORY, name


def test_shared_memory_suffices_for_the_widest_heads_with_rotary():
    for name, shared in finish(start("rotary", 256)).items():
        assert shared <= SHARED_MEMORY, name


@measured
@each_kernel
def test_nothing_is_spilled_but_what_is_known(layout, D, feature_map, kernels):
    stacks = {
        name: kernel["stack"] for name, kernel in kernels[f"{layout} {D} {feature_map}"].items()
    }
    for name, stack in stacks.items():
        assert stack <= SPILLS.get((name, D), 0), f"{name}: {stack} bytes"
    # What spills no more is to be taken off the list.
    assert [name for name, width in SPILLS if width == D and stacks[name] == 0] == []


@pytest.fixture(scope="module")
def focused():
    """The kernels of `focused_la` by the width of its heads, of FLatten-Swin and -PVT."""
    return finish(start("focused", 32, 64))


def test_focused_kernels_move_16_bytes_at_a_time(focused):
    for D, kernels in focused.items():
        shifted = {name for name, kernel in kernels.items() if "shift" in kernel["tiles"]}
        names = ("focus_rows_kernel", "state_kernel", "grad_key_kernel", "grad_focus_kernel")
        assert shifted == {f"{name} of k" for name in names}
        for name, kernel in kernels.items():
            for tensor, sizes in kernel["tiles"].items():
                assert set(sizes) == {16}, f"{name} {D}: {tensor} by {sorted(set(sizes))} bytes"
                assert sum(sizes) >= kernel["share"], f"{name} {D}: {tensor}"


@measured
def test_focused_kernels_spill_nothing(focused):
    for D, kernels in focused.items():
        for name, kernel in kernels.items():
            assert kernel["stack"] == 0, f"{name} {D}"
