"""LinFusion in UNets shaped like SD 1.5, 2.1 and XL equals the formula written out eagerly."""

import copy

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import nn

from fbila import LinFusion


class Eager(nn.Module):
    """The published layer, transcribed; parameters under the names of the checkpoints."""

    def __init__(self, dim: int, heads: int, mid_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_q_, self.to_k_ = (
            nn.Sequential(
                nn.Linear(dim, mid_dim),
                nn.LayerNorm(mid_dim),
                nn.LeakyReLU(),
                nn.Linear(mid_dim, dim),
            )
            for _ in range(2)
        )

    def forward(self, hidden_states, **_):
        b, n, c = hidden_states.shape
        q = self.to_q(hidden_states + self.to_q_(hidden_states))
        k = self.to_k(hidden_states + self.to_k_(hidden_states))
        v = self.to_v(hidden_states)
        q, k, v = (t.view(b, n, self.heads, c // self.heads).transpose(1, 2) for t in (q, k, v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = q @ k.mean(-2, keepdim=True).transpose(-2, -1) + 1e-4
        out = q @ ((k * n**-0.5).transpose(-2, -1) @ (v * n**-0.5)) / z
        return self.to_out[0](out.transpose(1, 2).reshape(b, n, c))


UNETS = {
    "sd15": (tiny_models.sd15_unet, None, 16, {40, 80, 160}),
    "sd21": (tiny_models.sd21_unet, None, 16, {64}),
    "sdxl": (tiny_models.sdxl_unet, 16, 28, {64}),
}


@pytest.mark.parametrize("name", UNETS)
def test_output_and_gradients(name):
    make, mid_dim_scale, count, head_dims = UNETS[name]
    unet = make()
    reference = copy.deepcopy(unet)
    linfusion = LinFusion.construct_for(
        unet=unet, load_pretrained=False, mid_dim_scale=mid_dim_scale
    )
    assert len(linfusion.report.swapped) == count
    assert {entry.head_dim for entry in linfusion.report.swapped} == head_dims
    torch.manual_seed(1)
    for parameter in linfusion.parameters():  # also of the maps that start at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    eager = nn.ModuleList()
    for layer, found in zip(linfusion.layers, linfusion.config["modules_list"], strict=True):
        dim = found["dim_n"]
        mid_dim = dim // mid_dim_scale if mid_dim_scale else dim
        assert found["projection_mid_dim"] == (mid_dim if mid_dim_scale else None)
        transcribed = Eager(dim, found["heads"], mid_dim)
        transcribed.load_state_dict(layer.state_dict())
        parent, _, child = found["module_name"].rpartition(".")
        setattr(reference.get_submodule(parent), child, transcribed)
        eager.append(transcribed)

    answers = []
    for model, trained in ((unet, linfusion), (reference, eager)):
        inputs = tiny_models.unet_inputs(model)
        inputs["sample"].requires_grad_(True)
        output = model(**inputs).sample
        parameters = dict(trained.named_parameters())
        wanted = [inputs["sample"], *parameters.values()]
        gradients = torch.autograd.grad(output.square().mean(), wanted)
        answers.append([output, *gradients])
    named = ["output", "sample", *parameters]
    for what, ours, theirs in zip(named, *answers, strict=True):
        scale = theirs.abs().max()
        assert scale > 0, what
        assert (ours - theirs).abs().max() <= 1e-5 * max(1, scale) + 2e-4 * scale * (
            what != "output"
        ), what
