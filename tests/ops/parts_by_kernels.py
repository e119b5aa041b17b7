"""What tests of parts share: the path of large ones on a GPU, for those of tests."""

import torch
from helpers import DEVICE

import fbila
from fbila.ops import parts as module
from fbila.ops.parts import put


def serve_all(monkeypatch):
    """However small the whole is, and on whichever device."""
    monkeypatch.setattr(module, "FEWEST", 0)
    monkeypatch.setattr(module, "direct", module.ordinary)


def copies_of(monkeypatch):
    """The shapes of what has to be copied, and whether two were added up."""
    shapes = []

    def counted(place, x, y):
        shapes.append((tuple(place.shape), y is not None))
        return put(place, x, y)

    monkeypatch.setattr(module, "put", counted)
    return shapes


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, heads=2):
    q, k, v = (heads_of(x, heads) for x in (q, k, v))
    out = fbila.linear_attn(q, k, v, feature_map="elu1", impl="triton")
    return out.transpose(1, 2).flatten(2)
