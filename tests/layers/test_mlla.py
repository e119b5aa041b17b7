"""MLLA's linear attention is its formula on any grid, and loads the official weights."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from vision_contracts import (
    Capture,
    assert_compiles,
    assert_factory,
    assert_formula,
    assert_kernels_agree,
    assert_serves,
    memory_of,
)

from fbila.layers import MLLALinearAttention, mlla

# Without `rope.rotations` (H, W, C / 2, 2), which official checkpoints have as well.
SHAPES = {
    "qk.weight": (64, 32),
    "qk.bias": (64,),
    "lepe.weight": (32, 1, 3, 3),
    "lepe.bias": (32,),
}


def official_table(h: int, w: int, c: int) -> torch.Tensor:
    """`rope.rotations`: cosine and sine of position * 10000^(-t / (C / 4))."""
    t = torch.arange(c // 4, dtype=torch.float64)
    rate = 10000 ** (-t / (c // 4))
    rows = (torch.arange(h)[:, None] * rate)[:, None].expand(h, w, c // 4)
    columns = (torch.arange(w)[:, None] * rate)[None].expand(h, w, c // 4)
    angles = torch.cat((rows, columns), -1)
    return torch.stack((angles.cos(), angles.sin()), -1)


def by_hand(p: dict[str, torch.Tensor], x: torch.Tensor, h: int, w: int, *, heads: int):
    """The published formula, with complex numbers and an explicit (N, N) matrix."""
    b, n, c = x.shape
    q, k = (F.elu(x @ p["qk.weight"].T + p["qk.bias"]) + 1).split(c, -1)
    turn = torch.view_as_complex(official_table(h, w, c)).view(n, c // 2)

    def rotated(t):
        pairs = torch.view_as_complex(t.reshape(b, n, c // 2, 2))
        return torch.view_as_real(turn * pairs).reshape(b, n, c)

    per_head = [t.view(b, n, heads, -1) for t in (q, k, rotated(q), rotated(k), x)]
    q, k, rq, rk, v = per_head
    weights = torch.einsum("bihd,bjhd->bhij", rq, rk) / n
    z = torch.einsum("bihd,bhd->bhi", q, k.mean(1)) + 1e-6
    o = torch.einsum("bhij,bjhd->bihd", weights / z[..., None], v).reshape(b, n, c)
    picture = x.transpose(1, 2).reshape(b, c, h, w)
    local = F.conv2d(picture, p["lepe.weight"], p["lepe.bias"], padding=1, groups=c)
    return o + local.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("dim", "heads", "h", "w"), [(32, 4, 5, 7), (24, 1, 4, 4), (20, 2, 1, 3), (64, 2, 9, 6)]
)
def test_formula(dim, heads, h, w):
    torch.manual_seed(0)
    layer = MLLALinearAttention(dim, heads)
    assert_formula(layer, by_hand, torch.randn(2, h * w, dim), h, w, heads=heads)


def test_a_square_needs_no_size():
    layer, x = MLLALinearAttention(32, 4), torch.randn(1, 9, 32)
    assert torch.equal(layer(x), layer(x, 3, 3))


def test_names_and_shapes():
    layer = MLLALinearAttention(32, 4)
    assert {n: tuple(p.shape) for n, p in layer.state_dict().items()} == SHAPES


@pytest.mark.parametrize("size", [(5, 7), (14, 14)])
def test_official_checkpoints_load_strictly(size):
    layer = MLLALinearAttention(32, 4)
    weights = {n: torch.randn(shape) for n, shape in SHAPES.items()}
    weights["rope.rotations"] = official_table(*size, 32).float()
    layer.load_state_dict(weights, strict=True)
    assert torch.equal(layer.qk.weight, weights["qk.weight"])
    ours = torch.stack(layer.rope(*size, torch.zeros(1))[:2], -1)  # (heads, N, C / 2 / heads, 2)
    theirs = weights["rope.rotations"].flatten(0, 1).unflatten(1, (4, 4)).transpose(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_other_tables_are_refused():
    layer = MLLALinearAttention(32, 4)
    weights = {n: torch.randn(shape) for n, shape in SHAPES.items()}
    for table in (official_table(3, 5, 64), 1 - official_table(3, 5, 32)):
        with pytest.raises(RuntimeError, match=r"rope.rotations is not the table"):
            layer.load_state_dict({**weights, "rope.rotations": table})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*rope.other"):
        layer.load_state_dict({**weights, "rope.other": table})


def test_tables_can_be_shared():
    layer, x = MLLALinearAttention(32, 4), torch.randn(1, 15, 32)
    tables = layer.rope(3, 5, x)
    assert torch.equal(layer(x, 3, 5, tables), layer(x, 3, 5))


def test_nothing_is_copied_on_the_way(monkeypatch):
    layer, x = MLLALinearAttention(32, 4), torch.randn(2, 15, 32)
    seen = {}
    layer.qk.register_forward_hook(lambda _, __, out: seen.update(qk=out))
    capture = Capture(mlla.linear_attn)
    monkeypatch.setattr(mlla, "linear_attn", capture)
    layer(x, 3, 5)
    assert [memory_of(t) for t in capture.inputs] == [
        memory_of(t) for t in (seen["qk"],) * 2 + (x,)
    ]
    assert capture.output.transpose(1, 2).flatten(2)._is_view()


def test_device_and_dtype_reach_every_parameter():
    assert_factory(partial(MLLALinearAttention, 32, 4))


def test_serves():
    assert_serves(MLLALinearAttention(32, 4), torch.randn(2, 15, 32), 3, 5)


def test_compiles():
    layer = MLLALinearAttention(32, 4)
    assert_compiles(layer, (torch.randn(2, 15, 32), 3, 5), (torch.randn(2, 28, 32), 4, 7))


def test_kernels(monkeypatch):
    layer = MLLALinearAttention(32, 2)
    assert_kernels_agree(monkeypatch, layer, torch.randn(1, 15, 32), 3, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 32, "num_heads": 5}, "num_heads must divide dim, got dim=32 and num_heads=5"),
        ({"dim": 12, "num_heads": 4}, "pairs of channels, got dim=12 and num_heads=4"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MLLALinearAttention(**settings)


def test_the_grid_must_hold_the_tokens():
    with pytest.raises(ValueError, match="got H=3 and W=4 for 15 tokens"):
        MLLALinearAttention(32, 4)(torch.randn(1, 15, 32), 3, 4)
