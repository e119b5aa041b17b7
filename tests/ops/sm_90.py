"""What becomes of the kernels on a Hopper GPU, found on any machine. A script that prints JSON.

It runs `linear_attn`, or `focused_la`, forward and backward in bfloat16 with launches that compile
their kernel and do nothing else. That takes a process of its own: the tests set TRITON_INTERPRET,
which Triton looks at when the kernels are imported.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# The order of batch, heads, tokens and head dim in memory.
LAYOUTS = {
    "head_major": (0, 1, 2, 3),
    "token_major": (0, 2, 1, 3),
    "channels_first": (0, 1, 3, 2),
}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
CUOBJDUMP = Path(nvidia.__file__).with_name("bin") / "cuobjdump"

# Of PTX: a register and the place of the parameter that it is loaded with; any other register that
# holds an address, and what it is computed from; an asynchronous copy's address and size; any other
# access, how many of how many bits, and its address.
PARAMETER = re.compile(r"\bld\.param\S*\s+(%rd\d+), \[\w+_param_(\d+)")
STEP = re.compile(r"^\s*(?:@\S+\s+)?(?!ld\.|atom\.)[a-z]\S*\s+(%rd\d+),(.*)", re.MULTILINE)
COPY = re.compile(r"\bcp\.async\.c[ag]\.\S+ \[[^]]+\], \[ *(%rd\d+)[^]]*\], (\w+)")
ACCESS = re.compile(r"\b(?:ld|st|atom|red)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s[^[]*\[ *(%rd\d+)")
PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)\.")


def layouts(D: int) -> list[str]:
    """Those in which heads of D are looked at: channels-first are EfficientViT's and DC-AE's."""
    return [name for name in LAYOUTS if D <= 32 or name != "channels_first"]


def feature_maps(D: int) -> list[str]:
    """Those with which they are: of narrow heads relu's product is another one than elu1's."""
    return ["elu1", "relu"] if D <= 32 else ["elu1"]


class Arguments(NamedTuple):
    """What `ASTSource` takes beside the kernel."""

    signature: dict[str, str]
    constexprs: dict[tuple[int], Any]
    attrs: dict[tuple[int], list]

    @staticmethod
    def of(launch: Any, tensors: tuple[torch.Tensor | None, ...]) -> "Arguments":
        """Those that Triton makes of `launch(*tensors)`."""
        names = launch.kernel.arg_names
        assert len(tensors) + len(launch.tail) == len(names)
        parameters = inspect.signature(launch.kernel.fn).parameters
        values = dict(zip(names, tensors, strict=False)) | launch.constants
        arguments = Arguments({}, {}, {})
        for i, name in enumerate(names):
            if name not in values:
                arguments.signature[name] = parameters[name].annotation
            elif isinstance(values[name], torch.Tensor):
                assert values[name].data_ptr() % 16 == 0
                arguments.signature[name] = TYPES[values[name].dtype]
                arguments.attrs[i,] = [["tt.divisibility", 16]]
            else:
                arguments.signature[name] = "constexpr"
                arguments.constexprs[i,] = values[name]
        return arguments

    @property
    def pointers(self) -> dict[int, str]:
        """The names of the tensors by their place among the compiled kernel's parameters."""
        present = [name for name, kind in self.signature.items() if kind != "constexpr"]
        return {i: name for i, name in enumerate(present) if self.signature[name][0] == "*"}


def launches(
    D: int, layout: str, tokens: int, feature_map: str | None = "elu1", **options: Any
) -> dict[str, tuple[Any, tuple[torch.Tensor | None, ...]]]:
    """The launches of both passes with their tensors, by their kernel and first tensor.

    Without those that add up splits. feature_map: None for that of `focused_la`.
    """
    import fbila
    from fbila.ops import functional
    from fbila.ops.kernels.launch import Launch

    order = LAYOUTS[layout]
    sizes = [(2, 3, tokens, D)[axis] for axis in order]
    q, k, v, do = (torch.zeros(sizes, dtype=torch.bfloat16).permute(order) for _ in range(4))
    inputs = {q.data_ptr(): "q", k.data_ptr(): "k"}
    made = {}

    def record(launch, *tensors):
        if launch.kernel.__name__.startswith(("sum_", "column_sums_")):
            return
        name = f"{launch.kernel.__name__} of {inputs[tensors[0].data_ptr()]}"
        assert name not in made
        made[name] = launch, tensors

    Launch.__call__ = record
    functional.choose_implementation = lambda *_: "triton"
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if feature_map is None:
        o = fbila.focused_la(*leaves, **options)
    else:
        o = fbila.linear_attn(*leaves, feature_map=feature_map, **options)
    torch.autograd.grad(o, leaves, do)
    return made


def compile_sm_90(launch: Any, arguments: Arguments) -> Any:
    """The launch's kernel, as Triton has it once it is compiled."""
    source = ASTSource(launch.kernel, *arguments)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(launch.options))


def accesses(ptx: str, pointers: dict[int, str]) -> dict[str, list[int]]:
    """The bytes of each access to global memory, by the pointer that its address comes from.

    Addresses are followed from register to register, whatever is added to them on the way.
    """
    origins: dict[str, set[str]] = {}
    for register, place in PARAMETER.findall(ptx):
        if int(place) in pointers:
            origins[register] = {pointers[int(place)]}
    steps = [(register, re.findall(r"%rd\d+", rest)) for register, rest in STEP.findall(ptx)]
    growing = True
    while growing:
        growing = False
        for register, sources in steps:
            known = origins.setdefault(register, set())
            before = len(known)
            known.update(*(origins.get(source, ()) for source in sources))
            growing |= len(known) > before
    found = [(register, int(size, 0)) for register, size in COPY.findall(ptx)]
    for vector, bits, register in ACCESS.findall(ptx):
        found.append((register, int(vector or 1) * int(bits) // 8))
    sizes: dict[str, list[int]] = {name: [] for name in pointers.values()}
    for register, size in found:
        (name,) = origins[register]
        sizes[name].append(size)
    return sizes


def resources(binary: bytes) -> dict[str, int]:
    """A thread's registers, and the bytes of its stack, to which those beyond 255 are spilled."""
    if not CUOBJDUMP.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
    }


def examine(launch: Any, arguments: Arguments) -> dict[str, Any]:
    """What the tests ask about one kernel.

    tiles: the bytes of each access to the tensors of tokens, which alone have 16 bits.
    share: the bytes of a block of tokens that are one thread's, at least.
    """
    compiled = compile_sm_90(launch, arguments)
    ptx = compiled.asm["ptx"]
    sizes = accesses(ptx, arguments.pointers)
    constants = launch.constants
    block = constants.get("BLOCK_N") or constants["BLOCK_M"]
    width = constants.get("WIDTH") or min(constants["K"], constants["V"])
    programs = 32 * launch.options["num_warps"] * launch.grid[1]
    return {
        "tiles": {name: x for name, x in sizes.items() if arguments.signature[name] == "*bf16"},
        "share": 2 * block * width // programs,
        "products": len(PRODUCT.findall(ptx)),
        "shared": compiled.metadata.shared,
        **resources(compiled.asm["cubin"]),
    }


def shared_with_rotary(D: int) -> dict[str, int]:
    """The bytes of shared memory of each kernel where channels i and i + D / 2 are rotated."""
    import fbila

    angles = torch.zeros(320, D // 2)
    rotary = fbila.Rotary(angles, angles, interleaved=False)
    return {
        name: compile_sm_90(launch, Arguments.of(launch, tensors)).metadata.shared
        for name, (launch, tensors) in launches(D, "token_major", 320, rotary=rotary).items()
    }


def focused(head_dims: list[int]) -> dict[str, dict[str, Any]]:
    """The kernels of `focused_la` with positions of the keys, whose tokens are as FLatten's."""
    result = {}
    for D in head_dims:
        positions = torch.zeros(320, 3, D, dtype=torch.bfloat16, requires_grad=True)
        found = launches(D, "token_major", 320, None, key_positions=positions.transpose(0, 1))
        result[str(D)] = {
            name: examine(launch, Arguments.of(launch, tensors))
            for name, (launch, tensors) in found.items()
        }
    return result


def main(head_dims: list[int]) -> None:
    compiled: dict[str, dict[str, Any]] = {}
    result: dict[str, dict[str, Any]] = {}
    for D in head_dims:
        for layout, feature_map in product(layouts(D), feature_maps(D)):
            kernels = result[f"{layout} {D} {feature_map}"] = {}
            # Short sequences have a kernel of their own.
            found = launches(D, layout, 64, feature_map) | launches(D, layout, 320, feature_map)
            for name, (launch, tensors) in found.items():
                arguments = Arguments.of(launch, tensors)
                key = repr((launch.kernel.__name__, arguments, launch.options))
                if key not in compiled:
                    compiled[key] = examine(launch, arguments)
                kernels[name] = compiled[key]
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "rotary":
        print(json.dumps(shared_with_rotary(int(sys.argv[2]))))
    elif sys.argv[1] == "focused":
        print(json.dumps(focused([int(D) for D in sys.argv[2:]])))
    else:
        main([int(D) for D in sys.argv[1:]])
