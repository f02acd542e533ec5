"""Windows of a grid: cut and joined, shifted, padded, pooled."""

import itertools

import pytest
import torch

from dit.layers.windows import Windows

CASES = [
    ((1, 4, 4), (1, 2, 2), (0, 0, 0)),
    ((4, 4, 6), (2, 2, 3), (1, 1, 1)),
    ((3, 5, 7), (2, 4, 4), (0, 0, 0)),
    ((3, 5, 7), (2, 4, 4), (1, 2, 2)),
    ((1, 2, 2), (1, 8, 8), (0, 4, 4)),
]


def cells(grid: tuple[int, int, int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(size) for size in grid)))


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_join_undoes_split(grid: tuple, window: tuple, shift: tuple) -> None:
    windows = Windows(grid, window, shift)
    tokens = torch.randn(2, len(cells(grid)), 3)
    split = windows.split(tokens)
    assert split.shape[1:] == (windows.tokens, 3)
    assert torch.equal(windows.join(split), tokens)


@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_mask_joins_what_lies_in_one_window(grid: tuple, window: tuple, shift: tuple) -> None:
    """Windows begin at the shift; what stands before it is a window of its own."""
    windows = Windows(grid, window, shift)
    numbers = [tuple((p - s) // w for p, s, w in zip(cell, shift, window, strict=True)) for cell in cells(grid)]
    indices = windows.split(torch.arange(1, len(numbers) + 1)[None])  # (G, n); 0 is padding
    mask = windows.mask()
    seen: dict[int, set[int]] = {}
    for group, row in enumerate(indices.tolist()):
        for query, index in enumerate(row):
            may = [True] * len(row) if mask is None else mask[group, query].tolist()
            assert any(may)
            keys = {other for other, allowed in zip(row, may, strict=True) if allowed}
            assert 0 not in keys or index == 0, "nobody looks at padding but padding"
            seen[index] = keys
    for index, number in enumerate(numbers, start=1):
        assert seen[index] == {other for other, its in enumerate(numbers, start=1) if its == number}


def test_a_fitting_grid_needs_no_mask() -> None:
    assert Windows((2, 4, 4), (2, 2, 2)).mask() is None


def test_pool_averages_without_padding() -> None:
    windows = Windows((1, 4, 5), (1, 4, 4))
    tokens = torch.arange(20.0)[None, :, None]
    means, real = windows.pool(tokens, (1, 1, 2))
    grid = tokens.reshape(4, 5)
    assert real.tolist() == [True, True, True, False]
    expected = [grid[:, [0, 2]].mean(), grid[:, [1, 3]].mean(), grid[:, 4].mean(), torch.tensor(0.0)]
    assert torch.allclose(means.flatten(), torch.stack(expected))
    plain, real = Windows((1, 4, 4), (1, 2, 2)).pool(tokens[:, :16], (1, 1, 1))
    assert real is None
    assert plain.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
