"""The pattern `neighborhood` is NATTEN's rule, on any grid, and its maps are as sparse as that rule says."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.attention import TokenGrid, pattern
from tests.attention.grids import Place, grids, slow_mask

TRIPLES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


def sees(x: int, y: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """Say whether x sees y on an axis, by listing the tokens of x's dilation group and the window among them."""
    group = [one for one in range(length) if one % dilation == x % dilation]
    if y not in group:
        return False
    place, other = group.index(x), group.index(y)
    window = min(window, len(group))
    together = [one for one in range(len(group)) if one // stride == place // stride]
    if causal:
        leader = min(together[0] + stride - 1, len(group) - 1)
        return other <= place and leader - other < window
    leader = min(together[0] + stride // 2, len(group) - 1)
    starts = range(len(group) - window + 1)  # the windows that lie within the group
    start = min(starts, key=lambda one: abs(one - (leader - window // 2)))
    return other in range(start, start + window)


@settings(deadline=None, max_examples=60)
@given(grid=grids(), data=st.data())
def test_the_mask_is_the_windows_of_the_rule(grid: TokenGrid, data: st.DataObject) -> None:
    window = data.draw(TRIPLES)  # larger than the axis at times
    stride = tuple(data.draw(st.integers(1, one)) for one in window)
    dilation = data.draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 3, 2), (2, 2, 2)]))
    causal = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))

    def allowed(query: Place, key: Place) -> bool:
        axes = zip(query, key, grid.shape, window, stride, dilation, causal, strict=True)
        return all(sees(*one) for one in axes)

    made = pattern(
        "neighborhood",
        grid,
        window=window,
        stride=stride,
        dilation=dilation,
        causal=causal,
        tile=data.draw(TRIPLES),
        key_tile=data.draw(st.none() | TRIPLES),
    )
    expected = slow_mask(grid, allowed)
    assert torch.equal(made.to_mask(), expected)
    assert made.token_density() == pytest.approx(float(expected.double().mean()))
    # nothing is visited for no pair, and the partial blocks are those that are neither empty nor full
    pruned = made.prune()
    assert torch.equal(pruned.visits, made.visits)
    assert pruned.partial is not None
    assert made.partial is not None
    assert torch.equal(pruned.partial, made.partial)


@pytest.mark.parametrize(
    ("shape", "window", "stride", "tile", "key_tile", "rule", "visited"),
    [
        ((30, 48, 80), (18, 24, 24), 1, (2, 8, 8), None, 11.111, 5.440),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), None, 11.111, 11.111),
        ((1, 256, 256), (1, 80, 80), 1, (1, 16, 8), None, 10.24, 7.515),
        ((1, 256, 256), (1, 80, 80), (1, 16, 16), (1, 16, 8), None, 10.24, 10.24),
        ((1, 64, 64), (1, 32, 32), (1, 16, 16), (1, 16, 8), None, 4.0, 3.2),
        ((1, 64, 64), (1, 32, 32), (1, 16, 16), (1, 16, 16), (1, 8, 8), 4.0, 4.0),
    ],
)
def test_speed_ups_of_generalized_neighborhood_attention(
    shape: Place, window: Place, stride: Any, tile: Place, key_tile: Any, rule: float, visited: float
) -> None:
    """The bounds that the paper gives for HunyuanVideo, FLUX at 4K and a small image (section 3 and its table)."""
    made = pattern("neighborhood", TokenGrid(*shape), window=window, stride=stride, tile=tile, key_tile=key_tile)
    assert 1 / made.token_density() == pytest.approx(rule, abs=1e-3)
    assert 1 / made.density() == pytest.approx(visited, abs=1e-3)
    assert made.asks_nowhere == (rule == visited)  # perfectly block-sparse


def test_one_number_is_for_all_axes_and_a_large_window_is_dense() -> None:
    grid = TokenGrid(1, 5, 7)
    assert torch.equal(
        pattern("neighborhood", grid, window=3).to_mask(), pattern("neighborhood", grid, window=(1, 3, 3)).to_mask()
    )
    assert pattern("neighborhood", grid, window=99, stride=4).is_dense


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"window": (3, 3)}, "one for each axis"),
        ({"window": 3, "stride": 4}, "larger than the window"),
        ({"window": 3, "causal": 1}, "causal is 1"),
        ({"window": 3, "tile": (1, 0, 1)}, "tile is"),
    ],
)
def test_wrong_parameters_say_what_is_accepted(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pattern("neighborhood", TokenGrid(2, 4, 4), **params)
