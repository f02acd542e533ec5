"""Maps of trained attention against slow rules, and that those of images without text keep a block in every row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.attention import TokenGrid, pattern
from dit.attention.corrections import CorrectionCall, correction
from dit.attention.kernels.contract import Tail
from dit.attention.sparse import block_sparse_attention

GRIDS = st.builds(TokenGrid, st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


def draw(grid: TokenGrid, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, grid.length, 2, 4, generator=generator) for _ in range(2))
    return query, key


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.integers(0, 99), st.floats(0.05, 1))
def test_dma_visits_the_stripes_with_the_largest_bias(grid: TokenGrid, seed: int, keep: float) -> None:
    query, key = draw(grid, seed)
    bias = torch.randn(2, 2, grid.length, generator=torch.Generator().manual_seed(seed))
    visits = pattern("dma", grid, query=query, key=key, bias=bias, keep=keep, block=4).visits
    count = -(-grid.length // 4)
    for b in range(2):
        for k in range(2):
            best = sorted(range(count), key=lambda j, b=b, k=k: -float(bias[b, k, 4 * j : 4 * j + 4].max()))
            expected = [j in best[: max(round(keep * count), 1)] for j in range(count)]
            assert visits[b, k].tolist() == [expected] * count


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
def test_proxy_sees_its_window_and_the_means_of_the_others(grid: TokenGrid, window: tuple[int, int, int]) -> None:
    block_map = pattern("proxy", grid, window=window)
    frame, row, column = grid.coordinates(torch.arange(grid.length))
    own = torch.stack([frame // window[0], row // window[1], column // window[2]], -1)
    assert torch.equal(block_map.to_mask()[0, 0], (own[:, None] == own[None]).all(-1))
    query, key = draw(grid, 0)
    value = torch.ones_like(key)

    def sparse(*, tail: Tail | None = None, return_lse: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        return block_sparse_attention(query, key, value, block_map, kernel="reference", tail=tail), None

    call = CorrectionCall(query, key, value, block_map, 0.5, sparse, lambda **_: (query, None))
    assert torch.allclose(correction("pooled_tail")(call), value)  # weights sum to 1


@settings(max_examples=15, deadline=None)
@given(GRIDS, st.integers(0, 99))
def test_coarse_gate_and_sla_choose_by_means(grid: TokenGrid, seed: int) -> None:
    query, key = draw(grid, seed)
    for name, params in (("coarse_gate", {"tile": (1, 2, 3)}), ("sla", {"block": 4, "key_block": 4})):
        block_map = pattern(name, grid, query=query, key=key, keep=0.5, **params)
        blocks = block_map.keys.block_of()[0, 0]
        count = block_map.keys.count
        query_mean, key_mean = (
            torch.stack([x[:, blocks == j].mean(1) for j in range(count)], dim=2) for x in (query, key)
        )
        scores = torch.einsum("bkne,bkme->bknm", query_mean, key_mean)
        wanted = max(-(-count // 2) if name == "coarse_gate" else count // 2, 1)
        assert (block_map.visits.sum(-1) == wanted).all()
        chosen = scores.masked_fill(~block_map.visits, torch.inf).amin(-1)
        left = scores.masked_fill(block_map.visits, -torch.inf).amax(-1)
        assert (chosen >= left - 1e-5).all()


@pytest.mark.parametrize("name", ["coarse_gate", "sla", "dma", "proxy"])
def test_text_is_exact(name: str) -> None:
    grid = TokenGrid(2, 4, 4, 3, "first")
    query, key = draw(grid, 0)
    online = {} if name == "proxy" else {"query": query, "key": key}
    mask = pattern(name, grid, **online).to_mask()
    assert mask[:, :, :3].all()
    assert mask[..., :3].all()
