"""Position encodings of one grid for another, by products of one axis after the other."""

import pytest
import torch
import torch.nn.functional as F

from fbila.layers.grid import resize_positions

NATIVE = (3, 5)


def positions(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 15, 4, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", [(6, 8), (5, 3), (2, 4), (1, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_they_are_interpolated_in_both_directions(size, dtype):
    table = positions(dtype)
    picture = table.double().mT.unflatten(2, NATIVE)
    expected = F.interpolate(picture, size, mode="bicubic", antialias=True).flatten(2).mT
    actual = resize_positions(table, NATIVE, size)
    assert actual.dtype == dtype and actual.shape == expected.shape
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=4 * tolerance)


def test_the_order_of_products_is_nobodys_choice(monkeypatch):
    """opt_einsum chooses it by the sizes, and so ties a graph that is compiled for any to one."""
    seen, stock = [], torch.einsum

    def einsum(equation, *operands):
        seen.append(len(operands))
        return stock(equation, *operands)

    monkeypatch.setattr(torch, "einsum", einsum)
    table = positions()
    assert resize_positions(table, NATIVE, NATIVE) is table
    resize_positions(table, NATIVE, (4, 6))
    assert all(operands <= 2 for operands in seen)
