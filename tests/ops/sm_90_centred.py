"""As `sm_90.py`, of linear attention of values about their mean. A script that prints JSON."""

import json

import torch
from sm_90 import PRODUCT, Arguments, accesses, compile_sm_90, resources

from fbila.ops import centred_library
from fbila.ops.kernels.launch import Launch


def launches(D: int, tokens: int):
    """Those of both passes, with their tensors, of q, k and v side by side in memory."""
    made = []
    Launch.__call__ = lambda launch, *tensors: made.append((launch, tensors))
    packed = torch.zeros(2, tokens, 3 * 2 * D, dtype=torch.bfloat16)
    q, k, v = (x.unflatten(-1, (2, D)).transpose(1, 2) for x in packed.chunk(3, -1))
    o, mean, *kept = centred_library.forward(q, k, v, "relu", 0.1)
    centred_library.backward(o, mean, q, k, v, *kept, "relu", 0.1)
    return made


def main() -> None:
    result = {}
    for D in (24, 32, 64):
        for tokens in (49, 3136):
            for launch, tensors in launches(D, tokens):
                arguments = Arguments.of(launch, tensors)
                compiled = compile_sm_90(launch, arguments)
                ptx = compiled.asm["ptx"]
                sizes = accesses(ptx, arguments.pointers)
                result[f"{D} {tokens}: {launch.kernel.__name__}"] = {
                    "tiles": {name: sizes.get(name) for name in ("q", "k", "v", "o", "dk", "dv")},
                    "products": len(PRODUCT.findall(ptx)),
                    **resources(compiled.asm["cubin"]),
                }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
