"""Linear attention of values about their mean as it is compiled for a Hopper GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

try:
    from . import sm_90
except ImportError as missing:
    pytest.skip(f"this Triton cannot compile for sm_90: {missing}", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels():
    """What `sm_90_centred.py` prints. A process of its own, see there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(sm_90.__file__).with_name("sm_90_centred.py")
    process = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_all_kernels_are_seen(kernels):
    backward = {"grad_query_kernel", "centre_gradient_kernel", "grad_key_kernel"}
    seen = {"49": backward | {"short_kernel"}, "3136": backward | {"sum_splits_kernel"}}
    seen["3136"] |= {"state_kernel", "centre_kernel", "output_kernel"}
    for D in (24, 32, 64):
        for tokens, names in seen.items():
            prefix = f"{D} {tokens}: "
            assert {x.removeprefix(prefix) for x in kernels if x.startswith(prefix)} == names


def test_tokens_are_moved_16_bytes_at_a_time(kernels):
    for name, kernel in kernels.items():
        for tensor, sizes in kernel["tiles"].items():
            assert sizes is None or set(sizes) == {16}, f"{name}: {tensor} by {sizes} bytes"


def test_products_are_on_the_tensor_cores(kernels):
    for name, kernel in kernels.items():
        sums = any(kind in name for kind in ("centre", "sum_splits"))
        assert sums or kernel["products"] > 0, name


@pytest.mark.skipif(
    not triton.__version__.startswith("3.9.") or not sm_90.CUOBJDUMP.exists(),
    reason="registers were counted with Triton 3.9.x and its own cuobjdump",
)
def test_registers_suffice_for_many_programs_at_a_time(kernels):
    for name, kernel in kernels.items():
        assert kernel["stack"] == 0, f"{name}: {kernel['stack']} bytes"
    # Where sums of values and features kept as many rows as a block has, 183 and 244.
    assert kernels["32 3136: state_kernel"]["registers"] <= 160
    assert kernels["64 49: short_kernel"]["registers"] <= 200
