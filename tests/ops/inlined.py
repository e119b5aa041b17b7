"""What a compiler's graph of some calls is made of, on any machine. A script that prints JSON.

The tensors are fake ones on a GPU. It is a process of its own, since the tests set
TRITON_INTERPRET, and interpreted kernels are in no graph.
"""

import json
import sys

import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fbila import focused_la, linear_attn
from fbila.ops import inlining
from fbila.ops.depthwise_conv_library import depthwise_conv
from fbila.ops.norm_library import layer_norm_leaky_relu
from fbila.ops.signed_map_library import signed_map
from fbila.ops.silu_gate_library import silu_gate


class Driver:
    """All that the analysis of a kernel asks a driver for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return (self.function(*tensors),)


def parts(function, *tensors):
    """The graph's kernels with what each writes to, and fbila's ops."""
    with torch.no_grad():
        graph, _ = aot_export_module(Call(function), tensors, trace_joint=False)
    return parts_of(graph)


def exported(function, *tensors):
    """The same of what torch.export writes."""
    with torch.no_grad():
        program = torch.export.export(Call(function), tensors)
    return parts_of(program.run_decompositions())


def parts_of(graph):
    found = []
    for node in graph.graph.nodes:
        name = str(node.target)
        if "triton_kernel_wrapper" in name:
            found.append(["kernel", *node.kwargs["tensors_to_clone"]])
        elif "fbila" in name:
            found.append([name])
    return found


def attend(q, k, v):
    return linear_attn(q, k, v, feature_map="elu1", eps=1e-4)


def norm(x, weight, bias):
    return layer_norm_leaky_relu(x, weight, bias, 1e-5, 0.01)


def heads(D, N, dtype=torch.float16):
    """Queries, keys and values side by side in memory."""
    packed = torch.empty(2, N, 3 * 8 * D, device="cuda", dtype=dtype)
    return [x.unflatten(-1, (8, D)).transpose(1, 2) for x in packed.chunk(3, -1)]


def main():
    driver.set_active(Driver())
    inlining._shared_memory = lambda device: int(sys.argv[1])
    with FakeTensorMode():
        graphs = {f"{D} {N}": parts(attend, *heads(D, N)) for D in (8, 40, 160) for N in (64, 4096)}
        weights = [torch.empty(2, 32, device="cuda", dtype=torch.float16) for _ in range(2)]
        graphs["norm"] = parts(norm, torch.empty_like(weights[0])[:, None], *weights)
        graphs["focused"] = parts(focused_la, *heads(32, 3136))
        q, _, v = heads(32, 3136)
        graphs["signed_map"] = parts(lambda x: signed_map(x, None, None, "expm1")[0], q)
        graphs["silu_gate"] = parts(silu_gate, weights[0], weights[1])
        grid = v.transpose(1, 2).flatten(2).unflatten(1, (56, 56))
        taps, bias = torch.empty(257, 1, 5, 5, device="cuda", dtype=torch.float16).split((256, 1))
        bias = bias.new_empty(256)
        graphs["depthwise_conv"] = parts(depthwise_conv, grid, taps, bias)
        graphs["with all"] = parts(depthwise_conv, grid, taps, bias, grid + 1, grid)
        graphs["float64"] = parts(attend, *heads(64, 300, torch.float64))
        graphs["nothing"] = parts(attend, *heads(64, 0))
        far = torch.empty(1, device="cuda", dtype=torch.float16)
        far = far.as_strided((2, 8, 300, 64), (2**31, 64, 512, 1))
        graphs["far"] = parts(attend, far, far, far)
        graphs["exported"] = exported(attend, *heads(64, 300))
    q = of_any_length()
    with q.fake_mode:
        graphs["symbols"] = parts(attend, q, q, q)
    print(json.dumps(graphs))


def of_any_length():
    lengths = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(
        torch.empty(2, 300, 8, 64, device="meta", dtype=torch.float16),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=lengths),
    )
    return x.new_empty(x.shape, device="cuda").transpose(1, 2)


if __name__ == "__main__":
    main()
