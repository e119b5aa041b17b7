"""What is compared in the same run, as far as it can be had.

A peer is a function of a case that gives the ways to call it, by name, of which the fastest counts;
or raises Absent. flash_bla is https://github.com/fla-org/flash-bidirectional-linear-attention; it
need only be importable.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case
from .eager import EPS, FEATURE_MAPS, Attention, eager

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Beyond these softmax attention takes a tenth of a second and more, or too much memory.
MOST_OPERATIONS = 4e13
MOST_SCORE_BYTES = 2**32


class Absent(Exception):
    """This peer is not here, or not for this case; the words say why."""


def _eager(case: Case) -> dict[str, Attention]:
    return {"eager": eager(case)}


def _compiled(case: Case) -> dict[str, Attention]:
    # Otherwise some versions run a compiled backward pass only once for each forward pass.
    functorch_config.donated_buffer = False
    return {"default": torch.compile(eager(case), fullgraph=True, dynamic=False)}


def _sdpa(case: Case) -> dict[str, Attention]:
    scores = case.B * case.H * case.N * case.keys
    operations = 4 * scores * case.D
    if operations > MOST_OPERATIONS:
        raise Absent(f"{operations:.1e} operations")
    if case.method == "host":
        # To choose a backend costs more than to call it.
        return {"unchosen": F.scaled_dot_product_attention}
    return {
        name: _with_backend(backend)
        for name, backend in BACKENDS.items()
        if name != "math" or 4 * scores <= MOST_SCORE_BYTES
    }


def _with_backend(backend: SDPBackend) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def _flash_bla(case: Case) -> dict[str, Attention]:
    if case.keys != case.N:
        raise Absent("needs as many keys as queries")
    phi = FEATURE_MAPS[case.feature_map]
    try:
        if case.operator == "simple_la":
            module = importlib.import_module("flash_bla.ops.simple_la.fused")
            function = module.simple_la
        else:
            module = importlib.import_module("flash_bla.ops.linear_attn.fused")
            function = _with_eps(module.linear_attention)
    except (ImportError, AttributeError) as error:
        raise Absent(f"flash_bla: {error}") from error
    _tune_likely_configurations(module)
    # It has no feature maps of its own.
    return {"flash_bla": lambda q, k, v: function(phi(q), phi(k), v)}


def _with_eps(function: Callable) -> Attention:
    return lambda q, k, v: function(q, k, v, eps=EPS)


def _tune_likely_configurations(module: ModuleType) -> None:
    """Of up to 144 configurations a kernel, try the likely ones; anew for each head dim too.

    Its own key is the length alone: what the first head dim chose would serve them all.
    """
    for kernel in vars(module).values():
        if hasattr(kernel, "early_config_prune"):
            kernel.keys = ["L", "DK", "DV"]
            kernel.early_config_prune = _likely


def _likely(configurations: list, arguments: dict, **options: object) -> list:
    """Blocks that waste least of the head dim; no fewer than 4 warps; few and many stages."""
    block = 32 if max(options["DK"], options["DV"]) <= 32 else 64
    kept = [
        x
        for x in configurations
        if x.num_warps in (4, 8)
        and x.num_stages in (2, 4)
        and all(x.kwargs.get(name, block) == block for name in ("BK", "BV"))
    ]
    return kept or configurations


PEERS: dict[str, Callable[[Case], dict[str, Attention]]] = {
    "eager": _eager,
    "compiled": _compiled,
    "sdpa": _sdpa,
    "flash_bla": _flash_bla,
}
# Those that compute what fbila computes, and are held to it.
SAME_MATHEMATICS = ("eager", "compiled", "flash_bla")
