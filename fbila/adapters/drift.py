"""How far a new module's answer is from the original's, layer by layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .report import LayerDrift


@contextmanager
def beside(
    originals: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
) -> Iterator[list[LayerDrift]]:
    """Runs each new module beside its original wherever that runs inside the block.

    Args:
        originals, modules: By their path in the model.

    Yields:
        What is found, one entry a module, in the order in which they ran.
    """
    drifts: list[LayerDrift] = []

    def compare(name: str, args: tuple, kwargs: dict, expected: torch.Tensor) -> None:
        # Not through its hooks, which may be those of the original.
        actual = modules[name].forward(*args, **kwargs).double()
        difference = (actual - expected.double()).norm() / expected.double().norm()
        # A picture (B, C, height, width), or (B, ..., C).
        channel = expected[0, 0] if expected.dim() == 4 else expected[0, ..., 0]
        tokens = channel.numel()
        drifts.append(LayerDrift(name, tokens, difference.item(), bool(actual.isfinite().all())))

    hooks = [
        module.register_forward_hook(
            lambda _, args, kwargs, expected, name=name: compare(name, args, kwargs, expected),
            with_kwargs=True,
        )
        for name, module in originals.items()
    ]
    try:
        yield drifts
    finally:
        for hook in hooks:
            hook.remove()
