"""The feed-forward layer: its modules may be replaced and have hooks, as timm's."""

import pytest
import torch
from timm.layers import Mlp as TimmMlp
from torch import nn

from fbila.models.mlp import Mlp


class Adapted(nn.Module):
    """A linear map beside another, which both see the input, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base, self.other = base, nn.Linear(32, 8)

    def forward(self, x, **options):
        return self.base(x, **options) + self.other(x)


def replace(name, module):
    return lambda mlp: setattr(mlp, name, module)


def adapt(mlp):
    mlp.fc2 = Adapted(mlp.fc2)


CHANGES = {
    "none": lambda mlp: None,
    "tanh": replace("act", nn.GELU("tanh")),
    "act": replace("act", nn.SiLU()),
    "drop": replace("drop1", nn.Identity()),
    "norm": replace("norm", nn.LayerNorm(32)),
    "fc2": replace("fc2", nn.Linear(32, 8)),
    "adapted": adapt,
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_what_its_modules_say(change):
    mlp = Mlp(8, 32)
    CHANGES[change](mlp)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(mlp(x), TimmMlp.forward(mlp, x), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["act", "drop1", "norm", "fc2"])
def test_hooks_see_what_modules_read(name):
    mlp, x = Mlp(8, 32), torch.randn(2, 5, 8)
    seen = []
    getattr(mlp, name).register_forward_hook(lambda module, inputs, output: seen.extend(inputs))
    mlp(x)
    mlp_seen = seen.copy()
    TimmMlp.forward(mlp, x)
    assert len(mlp_seen) == 1
    torch.testing.assert_close(mlp_seen, seen[1:])
