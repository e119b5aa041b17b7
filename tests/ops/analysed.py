"""How often PyTorch has kernels analysed that become part of a graph. A script that prints JSON.

It is a process of its own, as `inlined` is.
"""

import json
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from inlined import Driver, attend, heads, parts
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import wrap_triton
from triton.runtime import driver

from fbila.ops import inlining

ANALYSED: list[str] = []


@triton.jit
def foreign_kernel(x, o):
    tl.store(o, tl.load(x))


def foreign(x: torch.Tensor) -> torch.Tensor:
    o = torch.empty_like(x)
    wrap_triton(foreign_kernel)[(1,)](x, o)
    return o


def analysed(call: Callable[[], object]) -> list[str]:
    """The kernels of a call, each as often as it was analysed."""
    ANALYSED.clear()
    call()
    return list(ANALYSED)


def main() -> None:
    driver.set_active(Driver())
    inlining._shared_memory = lambda device: 227 * 1024
    generate = triton_kernel_wrap.generate_ttir

    def watched(kernel, *others):
        ANALYSED.append(getattr(kernel, "fn", kernel).__name__)
        return generate(kernel, *others)

    triton_kernel_wrap.generate_ttir = watched
    graphs = []
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        calls = {
            "one": lambda: graphs.append(parts(attend, *heads(32, 4096))),
            "again": lambda: graphs.append(parts(attend, *heads(32, 4096))),
            "shorter": lambda: parts(attend, *heads(32, 2048)),
            "narrower": lambda: parts(attend, *heads(32, 4096, torch.bfloat16)),
            "foreign": lambda: (parts(foreign, x), parts(foreign, x)),
        }
        found: dict[str, object] = {name: analysed(call) for name, call in calls.items()}
    print(json.dumps({"analysed": found, "graphs": graphs}))


if __name__ == "__main__":
    main()
