"""Training through the kernels goes where training through the specification goes."""

import pytest
import torch
from helpers import CUDA, DEVICE, MEAN, SIMPLE, Variant
from torch import nn

STEPS = 32


class Mixer(nn.Module):
    """Two residual attention layers and a linear read-out: enough for errors to feed back."""

    def __init__(self, variant: Variant, impl: str) -> None:
        super().__init__()
        self.variant, self.impl = variant, impl
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.qkv:
            # (B, N, 3, H, D), a packed qkv whose parts are read in place.
            q, k, v = layer(x).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
            o = self.variant(q, k, v, impl=self.impl)
            x = x + o.transpose(1, 2).flatten(2)
        return self.out(x)


def train(variant: Variant, impl: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Mixer(variant, impl).to(DEVICE)
    B = 2 if CUDA else 1
    x, target = torch.randn(B, 20, 16, device=DEVICE), torch.randn(B, 20, 4, device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("variant", [MEAN, SIMPLE._replace(scale=0.05)], ids=lambda x: x.name)
def test_losses_and_weights_agree_after_training(variant):
    losses, weights = train(variant, "triton")
    expected_losses, expected_weights = train(variant, "reference")
    assert expected_losses[-1] < 0.9 * expected_losses[0]
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    for weight, expected in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
