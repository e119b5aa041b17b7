"""A kernel is compiled for the shared memory that there is, and for one set of dtypes."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from fbila.ops.kernels.launch import Launch


class Kernel:
    """Stands for a kernel of Triton's that needs `size` bytes of shared memory a stage."""

    def __init__(self, size: int, limit: int):
        self.arg_names = ["x", "n", "BLOCK"]
        self.__name__, self.size, self.limit = "kernel", size, limit
        self.tried: list[int] = []

    def __getitem__(self, grid):
        def run(*arguments, num_stages, **options):
            self.tried.append(num_stages)
            if num_stages * self.size > self.limit:
                raise OutOfResources(num_stages * self.size, self.limit, "shared memory")
            return arguments, options

        return run


def launch(kernel: Kernel) -> Launch:
    return Launch(kernel, (1, 1), (3,), {"BLOCK": 16}, {"num_warps": 4, "num_stages": 4})


def test_stages_are_dropped_until_shared_memory_suffices():
    kernel, x = Kernel(30, 100), torch.zeros(3)
    assert launch(kernel)._first((x,)) == ((x, 3), {"BLOCK": 16, "num_warps": 4})
    assert kernel.tried == [4, 3]


def test_what_never_fits_raises():
    kernel = Kernel(200, 100)
    with pytest.raises(OutOfResources, match="Required: 200, Hardware limit: 100"):
        launch(kernel)._first((torch.zeros(3),))
    assert kernel.tried == [4, 3, 2, 1]


@pytest.mark.parametrize("size", [10, 25])
def test_what_fits_keeps_its_stages(size):
    kernel = Kernel(size, 100)
    launch(kernel)._first((torch.zeros(3),))
    assert kernel.tried == [4]


def test_without_a_gpu_other_dtypes_are_noticed():
    run = launch(Kernel(10, 100))
    run(torch.zeros(3))
    run(torch.zeros(5))
    with pytest.raises(AssertionError, match=r"launched for \[torch.float32\]"):
        run(torch.zeros(3, dtype=torch.float16))
