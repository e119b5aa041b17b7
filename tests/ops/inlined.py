"""What a compiler's graph of some calls is made of, on any machine. A script that prints JSON.

The tensors are fake ones on a GPU. It is a process of its own, since the tests set
TRITON_INTERPRET, and interpreted kernels are in no graph.
"""

import json
import re
import sys

import torch
import triton
from torch._functorch.aot_autograd import aot_export_module, aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from fbila import focused_la, linear_attn, linear_attn_apply, linear_attn_state, simple_la
from fbila.ops import (
    centred_library,
    functional,
    halves,
    inlining,
    window_attention_library,  # noqa: F401
)
from fbila.ops.depthwise_conv_library import depthwise_conv
from fbila.ops.kernels.focus import plan_focus_rows
from fbila.ops.kernels.memory import Axes
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


def trained(function, *tensors):
    """The same of both graphs of a training step, and the shapes of what is kept in between.

    The tensors are on the CPU: without a GPU, autograd takes none back that is on one.
    """
    found = {}

    def partition(joint, inputs, **options):
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
        # As it is here, a function returns one tensor.
        (kept,) = (node.args[0][1:] for node in forward.graph.find_nodes(op="output"))
        shapes = sorted(list(x.meta["val"].shape) for x in kept if isinstance(x, torch.fx.Node))
        found.update(forward=parts_of(forward), backward=parts_of(backward), kept=shapes)
        return forward, backward

    aot_function(
        function,
        fw_compiler=lambda graph, _: graph,
        bw_compiler=lambda graph, _: graph,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )(*(x.detach().requires_grad_() for x in tensors))
    return found


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


def heads(D, N, dtype=torch.float16, device="cuda"):
    """Queries, keys and values side by side in memory."""
    packed = torch.empty(2, N, 3 * 8 * D, device=device, dtype=dtype)
    return [x.unflatten(-1, (8, D)).transpose(1, 2) for x in packed.chunk(3, -1)]


def weighed(q, k, v, weight):
    return linear_attn(q, k, v, feature_map="elu1", eps=1e-4, key_weight=weight)


def in_halves(q, k, v):
    state = linear_attn_state(k, v, feature_map="elu1")
    return linear_attn_apply(q, state, feature_map="elu1", eps=1e-4)


def centred(q, k, v):
    o, mean = centred_library.centred_la(q, k, v, None, 0.1)
    return o + mean.unsqueeze(2)


def focused(q, k, v, scale):
    return focused_la(q, k, v, scale=scale)


def at_positions(q, k, v, scale, positions):
    return focused_la(q, k, v, scale=scale, key_positions=positions.transpose(0, 1))


def convolution(**options):
    """By the op, as what calls it leaves tensors on the CPU to PyTorch."""
    flags = [options.get(name, False) for name in ("residual", "gelu", "silu")]
    return lambda x, taps, bias, addend=None, gate=None: torch.ops.fbila.depthwise_conv(
        x, taps, bias, addend, gate, *flags
    )


def power(x, addend, table):
    return torch.cat(signed_map(x, addend, table, "power", both=True))


def expm1(x, table):
    return signed_map(x, None, table, "expm1")[0]


def windows(qkv, table, fill):
    """By the op, as the convolution is."""
    return torch.ops.fbila.window_attention(qkv, table, fill, (7, 7), (3, 3))


def trainings():
    def narrow(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    q, k, v = heads(32, 3136, torch.bfloat16, "cpu")
    grid = narrow(2, 56, 56, 256).chunk(2, -1)[0]
    taps, bias = torch.empty(128, 1, 5, 5), torch.empty(128)
    return {
        "focused": trained(focused, q, k, v, torch.empty(8, 32)),
        "at positions": trained(at_positions, q, k, v, torch.empty(8, 32), narrow(3136, 8, 32)),
        "long": trained(attend, q, k, v),
        "short": trained(attend, *heads(32, 49, torch.bfloat16, "cpu")),
        "simple": trained(simple_la, q, k, v),
        "weighed": trained(weighed, q, k, v, torch.empty(2, 8, 3136)),
        "in halves": trained(in_halves, q, k, v),
        "centred": trained(centred, q, k, v),
        "centred short": trained(centred, *heads(32, 49, torch.bfloat16, "cpu")),
        "float64": trained(attend, *heads(32, 3136, torch.float64, "cpu")),
        "depthwise_conv": trained(convolution(), grid, taps, bias),
        "with silu": trained(convolution(silu=True), grid, taps, bias),
        "with all": trained(
            convolution(residual=True, gelu=True), grid, taps[:32], bias[:32], grid, grid
        ),
        "power": trained(power, q, torch.empty(3136, 8, 32), torch.empty(2, 8, 32)),
        "expm1": trained(expm1, q, torch.empty(2, 8, 32)),
        "windows": trained(windows, narrow(2, 14, 14, 288), torch.empty(169, 3), torch.empty(288)),
        "windows beyond": trained(
            windows, narrow(2, 9, 9, 288), torch.empty(169, 3), torch.empty(288)
        ),
        "silu_gate": trained(torch.ops.fbila.silu_gate, *narrow(2, 2, 56, 56, 128)),
    }


def fused_into_sums():
    """How many products the kernel of the focused map's rows fuses into what other threads sum.

    It is compiled as PyTorch 2.11's Inductor does, which drops the option against that.
    """
    shape, stride = (2, 8, 3136, 32), (3136 * 768, 32, 768, 1)
    launch = plan_focus_rows(Axes(shape, stride), (0, 0), torch.bfloat16, 3.0)
    names = launch.kernel.arg_names
    numbers = names[5 : len(names) - len(launch.constants)]
    signature = {"x": "*bf16", "columns": "*fp32", "rows": "*fp32"}
    signature |= dict.fromkeys(("shift", "mask"), "constexpr")
    signature |= dict.fromkeys(numbers, "i32") | dict.fromkeys(launch.constants, "constexpr")
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, {"shift": None, "mask": None, **launch.constants}),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": launch.options["num_warps"], "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    heard = re.findall(r"shfl\.sync\S*\s+(%\w+)", ptx)
    assert heard
    return sum(x in heard for x in re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx))


def main():
    driver.set_active(Driver())
    inlining._shared_memory = lambda device: int(sys.argv[1])
    # On the CPU as well, for training.
    for module in (centred_library, functional, halves):
        module.choose_implementation = lambda *_: "triton"
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
        qkv = torch.empty(2, 9, 9, 288, device="cuda", dtype=torch.float16)
        table, fill = qkv.new_empty(169, 3), qkv.new_empty(288)
        graphs["windows"] = parts(windows, qkv, table, fill)
        graphs["float64"] = parts(attend, *heads(64, 300, torch.float64))
        graphs["nothing"] = parts(attend, *heads(64, 0))
        far = torch.empty(1, device="cuda", dtype=torch.float16)
        far = far.as_strided((2, 8, 300, 64), (2**31, 64, 512, 1))
        graphs["far"] = parts(attend, far, far, far)
        graphs["exported"] = exported(attend, *heads(64, 300))
    q = of_any_length()
    with q.fake_mode:
        graphs["symbols"] = parts(attend, q, q, q)
    with FakeTensorMode():
        training = trainings()
    print(json.dumps({"inference": graphs, "training": training, "fused": fused_into_sums()}))


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
