"""Time of `linear_attn` against the bytes that it must move, on one GPU.

    python -m benchmarks.ops --output benchmarks/results/ops.json

The floor is the bytes of the tensors that must cross memory (q, k, v, o forward; q, k, v, do, dq,
dk, dv backward) over the bandwidth of a device-to-device copy measured in the same run by the same
method. Times are medians of device events; the buffers are far larger than the L2 cache. A case
whose result is wrong has no time.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

from fbila.ops import linear_attn

# (B, N, H, D), token-major memory, bfloat16, "elu1" fused.
CASES = [
    (8, 16384, 16, 64),
    (2, 32768, 16, 64),
    (2, 16384, 8, 40),
    (2, 4096, 10, 64),
    (2, 32768, 20, 128),
]
WORST_ERROR = 2e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.ops needs a CUDA device.")

    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e9:.0f} GB/s (read plus written)")
    print("B, N, H, D               pass      floor ms      ms   x floor   error")
    rows = []
    for case in CASES:
        for row in measure(case, bandwidth):
            rows.append(row)
            print(
                f"{case!s:<24} {row['pass']:<9} {row['floor_ms']:8.3f} {row['ms']:8.3f} "
                f"{row['ms'] / row['floor_ms']:8.2f}   {row['error']:.1e}"
            )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**environment(bandwidth), "rows": rows}, indent=1))


def copy_bandwidth() -> float:
    """Bytes read plus written a second, copying 1 GiB."""
    x = torch.randn(2**29, device="cuda").to(torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (do_bench(lambda: y.copy_(x), return_mode="median") * 1e-3)


def measure(case: tuple[int, int, int, int], bandwidth: float) -> list[dict]:
    B, N, H, D = case
    q, k, v, do = (
        torch.randn(B, N, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(4)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o = linear_attn(*inputs, feature_map="elu1")
    errors = check(inputs, do, o)

    def backward() -> None:
        torch.autograd.grad(o, inputs, do, retain_graph=True)

    with torch.no_grad():
        forward_ms = quantiles(lambda: linear_attn(*inputs, feature_map="elu1"))
    backward_ms = quantiles(backward)
    rows = []
    for name, tensors, (median, low, high), error in (
        ("forward", 4, forward_ms, errors[0]),
        ("backward", 7, backward_ms, max(errors[1:])),
    ):
        row = {"B": B, "N": N, "H": H, "D": D, "dtype": "bfloat16", "pass": name}
        row |= {"ms": median, "ms_20": low, "ms_80": high, "error": error}
        row["floor_ms"] = tensors * q.nbytes / bandwidth * 1e3
        rows.append(row)
    return rows


def check(inputs: list[torch.Tensor], do: torch.Tensor, o: torch.Tensor) -> list[float]:
    """Relative errors of o, dq, dk, dv against float64 on the first batch item's first head."""
    exact = [x.detach()[:1, :1].double().requires_grad_() for x in inputs]
    o64 = linear_attn(*exact, feature_map="elu1", impl="reference")
    gradients64 = torch.autograd.grad(o64, exact, do[:1, :1].double())
    gradients = torch.autograd.grad(o, inputs, do, retain_graph=True)
    pairs = zip((o.detach(), *gradients), (o64.detach(), *gradients64), strict=True)
    errors = [((a[:1, :1] - b).norm() / b.norm()).item() for a, b in pairs]
    if not max(errors) < WORST_ERROR:
        raise SystemExit(f"{tuple(o.shape)}: relative errors {errors} pass {WORST_ERROR}.")
    return errors


def quantiles(function) -> tuple[float, float, float]:
    return tuple(do_bench(function, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8]))


def environment(bandwidth: float) -> dict:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "copy_bytes_per_second": bandwidth,
    }


if __name__ == "__main__":
    main()
