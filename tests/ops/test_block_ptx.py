"""The kernels around attention as they are compiled for a Hopper GPU: wide accesses, no spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

try:
    from . import sm_90
except ImportError as missing:
    pytest.skip(f"this Triton cannot compile for sm_90: {missing}", allow_module_level=True)

# What has a number for every channel at every position.
LARGE = ("x", "residual", "y", "o", "dx", "dy")


@pytest.fixture(scope="module")
def kernels():
    """What `sm_90_blocks.py` prints. A process of its own, see there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(sm_90.__file__).with_name("sm_90_blocks.py")
    process = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_all_kernels_are_seen(kernels):
    assert {name.split(": ")[1] for name in kernels} == {
        "group_statistics_kernel", "group_merge_kernel", "group_apply_kernel",
        "short_group_norm_kernel", "add_bias_kernel", "geglu_kernel", "norm_kernel",
        "grad_norm_kernel", "geglu_backward_kernel", "short_group_norm_backward_kernel",
        "group_grad_parts_kernel", "group_grad_merge_kernel", "group_grad_apply_kernel",
        "gated_conv_kernel",
        "separable_conv_kernel",
    }  # fmt: skip


def test_large_tensors_are_moved_16_bytes_at_a_time(kernels):
    for name, kernel in kernels.items():
        if "gated_conv" in name:
            # Its threads have two channels, see below.
            continue
        for tensor in set(LARGE) & set(kernel["accesses"]):
            # A group of 20 channels in channels_last is 40 bytes.
            narrow = "group_norm 640" in name and "short" in name and "channels_last" in name
            allowed = {8, 16} if narrow else {16}
            # Of NCHW each tap reads another shift of the contiguous axis.
            if "separable_conv" in name and "nchw" in name:
                allowed = {2, 4}
            sizes = kernel["accesses"][tensor]
            assert sizes and set(sizes) <= allowed, f"{name}: {tensor} by {sizes} bytes"


def test_a_warp_of_the_gated_convolution_moves_128_bytes_at_a_time(kernels):
    found = {name: kernel for name, kernel in kernels.items() if "gated_conv" in name}
    assert len(found) == 6
    for name, kernel in found.items():
        size = 8 if "float32" in name else 4
        sizes = {tensor: kernel["accesses"][tensor] for tensor in ("h", "y")}
        # Of two halves six pixels are read, of which four are written.
        assert sizes == {"h": 12 * [size], "y": 4 * [size]}, name
        # Four programs of 128 threads on a multiprocessor.
        assert kernel.get("registers", 0) <= 128, name


def test_nothing_is_spilled(kernels):
    for name, kernel in kernels.items():
        assert kernel.get("stack", 0) == 0, name
