"""Whether a model is still the one it was: same objects, same tensors, same answer."""

from collections.abc import Iterator
from contextlib import contextmanager

import tiny_models
import torch
from torch import nn


def modules(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails if the block leaves the model other than it found it."""
    before, attributes = modules(model), set(vars(model))
    tensors = {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}
    prediction = tiny_models.predict(model)
    yield
    assert modules(model) == before
    assert set(vars(model)) == attributes
    assert list(model.state_dict()) == list(tensors)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == tensors[name][0]
        assert torch.equal(tensor, tensors[name][1]), name
    assert torch.equal(tiny_models.predict(model), prediction)
