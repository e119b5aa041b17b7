"""The kernels around attention as they are compiled for a Hopper GPU: wide accesses, no spills."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    from . import sm_90
except ImportError as missing:
    pytest.skip(f"this Triton cannot compile for sm_90: {missing}", allow_module_level=True)

# What has a number for every channel at every position.
LARGE = ("x", "residual", "y", "opposite", "o", "dx", "dy", "dopposite", "v", "dv", "gate", "dgate")
LARGE += ("qkv", "dqkv", "z", "dz", "whole", "dwhole", "q", "k", "dq", "dk", "a", "da")


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
        "narrow_norm_kernel", "grad_norm_kernel", "gated_norm_kernel", "grad_gated_norm_kernel",
        "geglu_backward_kernel",
        "short_group_norm_backward_kernel",
        "group_grad_parts_kernel", "group_grad_merge_kernel", "group_grad_apply_kernel",
        "gated_conv_kernel", "gated_conv_backward_kernel",
        "separable_conv_kernel", "depthwise_conv_kernel", "depthwise_conv_sums_kernel",
        "add_up_kernel", "silu_gate_kernel", "silu_gate_backward_kernel",
        "signed_map_kernel", "signed_map_backward_kernel",
        "column_sums_kernel", "gelu_backward_kernel",
        "add_scaled_kernel", "add_scaled_backward_kernel",
        "magnitude_kernel", "magnitude_backward_kernel",
        "rotated_parts_kernel", "rotated_parts_backward_kernel", "place_kernel",
        "window_attention_kernel", "grad_window_attention_kernel", "grad_table_kernel",
    }  # fmt: skip


def test_large_tensors_are_moved_16_bytes_at_a_time(kernels):
    for name, kernel in kernels.items():
        if any(kind in name for kind in ("gated_conv", "separable_conv", "depthwise_conv")):
            # Their threads have two channels, or a few pixels, see below.
            continue
        for tensor in set(LARGE) & set(kernel["accesses"]):
            # A group of 20 channels in channels_last is 40 bytes.
            narrow = "group_norm 640" in name and "short" in name and "channels_last" in name
            allowed = {8, 16} if narrow else {16}
            sizes = kernel["accesses"][tensor]
            assert sizes and set(sizes) <= allowed, f"{name}: {tensor} by {sizes} bytes"


def test_a_warp_of_the_gated_convolution_moves_128_bytes_at_a_time(kernels):
    found = {name: kernel for name, kernel in kernels.items() if "gated_conv" in name}
    assert len(found) == 9 * 4
    # How many pixels are read or written: six of every row that has neighbours, four of others.
    pixels = {
        "gated_conv": {"h": 12, "y": 4},
        # There y is the gradient of both halves.
        "gradient of gated_conv": {"h": 12, "dy": 4, "y": 8},
        "gated_conv_backward_kernel": {"h": 4, "du": 6, "dh": 4},
    }
    for name, kernel in found.items():
        case, function = name.split(": ")
        if function == "add_up_kernel":
            # A few sums, and their transposes.
            continue
        expected = pixels.get(function, pixels[re.split(r" \d", case)[0]])
        size = 8 if "float32" in name else 4
        sizes = {tensor: kernel["accesses"][tensor] for tensor in expected}
        assert sizes == {tensor: number * [size] for tensor, number in expected.items()}, name
        # Four programs of 128 threads on a multiprocessor, or three.
        three = function == "gated_conv_backward_kernel" or (size == 8 and "dy" in expected)
        assert kernel.get("registers", 0) <= (168 if three else 128), name


def test_the_gradient_of_the_gated_convolution_keeps_two_rows(kernels):
    """Triton takes a variable for a constant that becomes another of the same first value."""
    found = {n: k for n, k in kernels.items() if n.endswith(": gated_conv_backward_kernel")}
    assert found
    for name, kernel in found.items():
        # Six pixels of each row, ten sums, and where the next row is.
        assert kernel["carried"] == [2 * 6 + 10 + 3], name


def test_a_warp_of_narrow_rows_has_the_next_ones_on_their_way(kernels):
    found = {n: k for n, k in kernels.items() if n.endswith(": narrow_norm_kernel")}
    assert len(found) == 2 * 3 + 2
    for name, kernel in found.items():
        assert kernel["carried"] == [1], name
        # Twenty programs on a multiprocessor, or sixteen.
        sixteen = "of float32" in name and "rms" not in name
        assert kernel.get("registers", 0) <= (128 if sixteen else 96), name


def test_gradients_of_norms_have_the_next_rows_on_their_way_and_their_programs_room(kernels):
    found = {n: k for n, k in kernels.items() if n.endswith(": grad_norm_kernel")}
    assert len(found) == 3 * 3 + 5 * 4
    for name, kernel in found.items():
        summed = "all" in name or "two norms" in name
        # Two tensors, and the sums of weight and bias.
        assert kernel["carried"] == [4 if summed else 2], name
        if "all" in name:
            D, short = int(name.split()[4]), "bfloat16" in name or "for maps" in name
            # Two, four or three programs of 128 threads on a multiprocessor. Of rows in pieces the
            # layout, and how many there are, depend on Triton's version.
            most = 255 if D > 256 else 128 if short and D & (D - 1) == 0 else 168
            assert kernel.get("registers", 0) <= most, name


def test_programs_of_gated_norms_have_room(kernels):
    found = {n: k for n, k in kernels.items() if n.endswith("gated_norm_kernel")}
    assert len(found) == 2 * 4 * 3
    for name, kernel in found.items():
        if "gradients" in name:
            # Three sums are carried, and there are two programs on a multiprocessor.
            assert kernel["carried"] == [3] and kernel.get("registers", 0) <= 255, name
        else:
            # Twelve programs of a warp, or eight.
            most = 255 if " 768 " in name else 168
            assert kernel["carried"] == [3] and kernel.get("registers", 0) <= most, name


def test_programs_of_layer_scales_have_room(kernels):
    found = {n: k for n, k in kernels.items() if n.endswith("add_scaled_backward_kernel")}
    assert len(found) == 3 * 3 * 3
    for name, kernel in found.items():
        # Four programs of 128 threads on a multiprocessor.
        assert kernel.get("registers", 0) <= 128, name


def test_programs_of_magnitude_have_room(kernels):
    found = {n: k for n, k in kernels.items() if n.split(": ")[1].startswith("magnitude")}
    assert len(found) == 3 * 5 * 5
    for name, kernel in found.items():
        # Three programs of 128 threads on a multiprocessor.
        assert kernel.get("registers", 0) <= 168, name


def test_programs_of_rotated_parts_have_room(kernels):
    found = {n: k for n, k in kernels.items() if "rotated_parts" in n}
    assert len(found) == 3 * 3 * 2
    for name, kernel in found.items():
        # Four programs of 128 threads on a multiprocessor.
        assert kernel.get("registers", 0) <= 128, name


def test_programs_of_windows_have_room(kernels):
    found = {n: k for n, k in kernels.items() if n.endswith("window_attention_kernel")}
    assert len(found) == 2 * 6
    for name, kernel in found.items():
        if "float32" not in name:
            # Four programs of 128 threads on a multiprocessor, or two of the gradients'.
            most = 255 if "gradients" in name else 128
            assert kernel.get("registers", 0) <= most, name


def test_a_row_of_the_separable_convolution_is_loaded_once_for_all_taps(kernels):
    """Ahead of the first one, and in either loop."""
    found = {name: kernel for name, kernel in kernels.items() if "separable_conv" in name}
    assert len(found) == 2 * 11
    for name, kernel in found.items():
        _, _, k, side, order, dtype = name.split(":")[0].split()
        itemsize, k, accesses = 4 if "32" in dtype else 2, int(k), kernel["accesses"]
        # Pixels of 7 are aligned as single ones are.
        wide = 16 if side == "32" else 2
        if order == "channels_last":
            # Two channels of four pixels, and of those on either side that taps reach.
            assert accesses["x"] == 3 * (k + 3) * [2 * itemsize], name
            assert set(accesses["y"]) == {16}, name
        else:
            # 16 bytes of a row, and a pixel at a time on either side.
            sizes = 16 // wide * [wide] + (k - 1) * [itemsize]
            assert sorted(accesses["x"]) == sorted(3 * sizes), name
            assert set(accesses["y"]) == {wide}, name
        if k <= 5 and side == "32":
            # Three or four programs of 128 threads on a multiprocessor.
            most = 168 if order == "channels_last" else 128
            assert kernel.get("registers", 0) <= most, name


def test_signed_maps_leave_room_for_three_programs(kernels):
    found = {name: kernel for name, kernel in kernels.items() if "signed_map" in name}
    assert len(found) == 4 * 4 * 2
    for name, kernel in found.items():
        assert kernel.get("registers", 0) <= 168, name


def test_a_depthwise_convolution_loads_a_pixel_once_for_a_row_of_taps(kernels):
    """And its sums keep the rows that they need: see the gated convolution's."""
    found = {name: kernel for name, kernel in kernels.items() if "depthwise_conv" in name}
    assert len(found) == 3 * 2 * 9
    for name, kernel in found.items():
        case, function = name.split(": ")
        k, accesses = int(case.split()[-2]), kernel["accesses"]
        if function == "depthwise_conv_kernel":
            # 8 pixels and their neighbours, ahead of the first and in either loop. Alone, or beside
            # an addend or what has the slope.
            alone = case.startswith(("gradient of depthwise", "curved"))
            size = 4 if (k == 3 and alone) or "float32" in name else 2
            # Two rows ahead of the first.
            two = alone and "float32" not in name and (k == 5 or case.startswith("curved"))
            assert accesses["x"] == (4 if two else 3) * (8 + k - 1) * [size], name
            assert set(accesses["y"]) == {size}, name
            # Six programs of 64 threads on a multiprocessor, or five.
            five = "with a gate" in name and k == 5 and "float32" in name
            assert kernel.get("registers", 0) <= (200 if five else 168), name
        elif function == "depthwise_conv_sums_kernel":
            # In more bytes of a pixel: taps are not there, but sums of them.
            size, row = 8 if k == 3 else 4, 8 + k - 1
            if "curved" in name:
                size = max(size // 2, 4 if "float32" in name else 2)
            assert accesses["x"] == 2 * row * [size] and set(accesses["dy"]) == {size}, name
            sums, window = k * k + 1, 8 * (k - 1)
            assert kernel["carried"] == [sums, sums + window + row + 8 + 3], name
            # Three programs of 128 threads on a multiprocessor, or two of twice as many channels.
            three = "curved" in name or "float32" in name
            assert kernel.get("registers", 0) <= (168 if three else 255), name


def test_nothing_is_spilled(kernels):
    for name, kernel in kernels.items():
        # Of rows in pieces this is true of the layout that Triton 3.6 chooses, as are registers.
        most = 8 if "all gradients of layer_norm 512 autocast" in name else 0
        assert kernel.get("stack", 0) <= most, name
