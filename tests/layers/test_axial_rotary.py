"""The tables are those of the published layers, on any grid, and the last ones are kept."""

import copy
import pickle

import pytest
import torch

from fbila.layers.axial_rotary import AxialRotary, axial_rotary


def angle(row: int, column: int, pair: int, dim: int, endpoint: bool) -> float:
    """Of one pair of channels of one token, as the papers' codes have it."""
    count = dim // 4
    position = row if pair < count else column
    last = max(count - 1, 1) if endpoint else count
    return position / 10000 ** (pair % count / last)


@pytest.mark.parametrize("endpoint", [False, True])
@pytest.mark.parametrize(("height", "width", "dim"), [(3, 5, 16), (1, 1, 4), (7, 2, 12)])
def test_angles(height, width, dim, endpoint):
    rotary = axial_rotary(height, width, dim, endpoint=endpoint, dtype=torch.float64)
    expected = torch.tensor(
        [
            [angle(i, j, pair, dim, endpoint) for pair in range(dim // 2)]
            for i in range(height)
            for j in range(width)
        ],
        dtype=torch.float64,
    )
    assert rotary.interleaved
    torch.testing.assert_close(rotary.cos, expected.cos(), rtol=0, atol=1e-14)
    torch.testing.assert_close(rotary.sin, expected.sin(), rtol=0, atol=1e-14)


def test_heads_have_parts_of_the_frequencies():
    whole = axial_rotary(3, 5, 24)
    parts = AxialRotary(24, num_heads=3)(3, 5, torch.zeros(1))
    for x, heads in zip(whole[:2], parts[:2], strict=True):
        for h in range(3):
            assert torch.equal(heads[h], x[:, 4 * h : 4 * h + 4])


def test_the_last_tables_are_kept_and_neither_saved_nor_copied():
    rope, x = AxialRotary(8), torch.zeros(1)
    first = rope(3, 5, x)
    assert rope(3, 5, x) is first
    assert rope(3, 4, x).cos.shape == (12, 4)
    assert rope(3, 4, x.double()).cos.dtype == torch.float64
    assert rope(3, 4, x.half()).cos.dtype == torch.float32
    assert not rope.state_dict()
    for other in (copy.deepcopy(rope), pickle.loads(pickle.dumps(rope))):
        assert other._last == (None, None)
        assert torch.equal(other(3, 5, x).cos, first.cos)


def test_tables_made_in_inference_mode_serve_training():
    rope = AxialRotary(8)
    with torch.inference_mode():
        rope(3, 5, torch.zeros(1))
    assert not rope(3, 5, torch.zeros(1)).cos.is_inference()


def test_nothing_is_kept_of_a_trace():
    rope = AxialRotary(8)
    compiled = torch.compile(rope, fullgraph=True, backend="eager", dynamic=True)
    for grid in ((3, 5), (4, 7)):
        assert torch.equal(compiled(*grid, torch.zeros(1)).cos, axial_rotary(*grid, 8).cos)
    assert rope._last == (None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 6}, "dim to be a multiple of 4: 6"),
        ({"dim": 12, "num_heads": 4}, "pairs of channels, got dim=12 and num_heads=4"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AxialRotary(**settings)
