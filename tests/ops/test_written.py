"""What a kernel writes to is found once for launches alike, and only this package's remember it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fbila.ops.written import remembered

THREE = ["state_kernel", "sum_splits_kernel", "output_kernel"]


@pytest.fixture(scope="module")
def found() -> dict:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("analysed.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_launches_alike_are_analysed_once(found):
    assert found["analysed"]["one"] == THREE
    assert found["analysed"]["again"] == []
    first, second = found["graphs"]
    assert first == second == [["kernel", "partial"], ["kernel", "state"], ["kernel", "o"]]


def test_other_lengths_and_dtypes_are_analysed_anew(found):
    assert found["analysed"]["shorter"] == THREE
    assert found["analysed"]["narrower"][0] == "state_kernel"


def test_kernels_of_others_are_analysed_every_time(found):
    assert len(found["analysed"]["foreign"]) > 1


class Kernel:
    """As far as it is looked at."""

    module = "fbila.ops.kernels.state"


class Tuned:
    """What PyTorch makes of a launch with options."""

    def __init__(self, kernel: Kernel, **kwargs: int) -> None:
        self.fn = kernel
        self.configs = [type("Config", (), {"kwargs": kwargs})]


class Box:
    """A tensor of Inductor's."""

    def get_dtype(self) -> torch.dtype:
        return torch.float32


def remembering():
    """What remembers, and all that it asks for."""
    asked = []

    def analyse(kernel, arguments, descriptors):
        asked.append((kernel, arguments))
        return [name for name in arguments if name == "o"]

    return remembered(analyse), asked


def test_an_answer_serves_fake_tensors_and_those_of_inductor():
    answer, asked = remembering()
    kernel, o = Kernel(), torch.empty(2)
    assert answer(Tuned(kernel), {"o": o, "n": 3}, {}) == ["o"]
    # Others may add to what they are given.
    answer(Tuned(kernel), {"o": torch.empty(5), "n": 3}, {}).append("n")
    assert answer(kernel, {"n": 3, "o": Box()}, {}) == ["o"]
    assert len(asked) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"o": torch.empty(2, dtype=torch.float16), "n": 1},
        {"o": torch.empty(2), "n": True},
        {"o": torch.empty(2), "n": 1.0},
        {"o": None, "n": 1},
    ],
)
def test_other_arguments_have_answers_of_their_own(other):
    answer, asked = remembering()
    kernel = Kernel()
    answer(kernel, {"o": torch.empty(2), "n": 1}, {})
    answer(kernel, other, {})
    answer(Kernel(), other, {})
    answer(Tuned(kernel, m=2), other, {})
    assert len(asked) == 4


def test_what_is_not_known_goes_to_pytorch():
    answer, asked = remembering()
    theirs = type("Theirs", (), {"module": "fbilater.kernels"})()
    for arguments in [(theirs, {"n": 1}, {}), (Kernel(), {"n": 1}, {"n": "a descriptor"})]:
        answer(*arguments)
        answer(*arguments)
    answer(Kernel(), {"n": 1}, descriptors={})
    assert len(asked) == 5
