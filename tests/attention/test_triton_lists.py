"""The lists that the Triton kernel follows say the same pairs as the map, on any layout; they need no triton."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.attention import TokenGrid
from dit.attention.block_map import BlockMap, TokenRule, make_block_map
from dit.attention.kernels.triton_lists import ASKED, cut, lists_of
from dit.attention.layout import cluster_layout, raster_layout, tile_layout


class Thirds(TokenRule):
    def allowed(self, query, key):
        return (query + 2 * key) % 3 > 0


class WithTable(Thirds):
    """A rule that keeps a tensor is asked on the CPU."""

    def __init__(self):
        self.table = torch.arange(10000) % 3

    def allowed(self, query, key):
        return self.table[query + 2 * key] > 0


def mask_of(block_map: BlockMap, block_m: int, block_n: int, batch: int, head: int) -> torch.Tensor:
    """The pairs that a program would compute, in the order of the sequence, (N, M)."""

    def own(x):
        return x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)]

    lists = lists_of(block_map, block_m, block_n)
    length = block_map.queries.grid.length
    source = torch.arange(length) if lists.source is None else own(lists.source)
    mask = torch.zeros(length, block_map.keys.grid.length, dtype=torch.bool)
    for block, start, size, in_block in own(lists.query_pieces).tolist():
        rows = own(lists.query_order)[start : start + size].long()
        whole, others = own(lists.counts)[block].tolist()
        for at, entry in enumerate(own(lists.entries)[block, : whole + others].tolist()):
            piece, asked = entry % ASKED, entry >= ASKED
            tokens = source[piece * block_n : (piece + 1) * block_n]
            count = int(own(lists.key_sizes)[piece])
            assert (tokens[:count] >= 0).all()
            assert at >= whole or (count == block_n and not asked), "a whole piece has all its keys"
            pairs = torch.zeros(len(rows), block_n, dtype=torch.bool)
            pairs[:, :count] = True
            if asked:
                words = lists.bits[lists.bits_of[block, piece], in_block : in_block + size]  # (R, BLOCK_N / 32)
                column = torch.arange(block_n)
                pairs &= (words[:, column // 32] >> (column % 32)) & 1 == 1
            assert not mask[rows[:, None], tokens[None, :count]].any(), "no pair is computed twice"
            mask[rows[:, None], tokens[None, :count]] = pairs[:, :count]
    return mask


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)),
    text=st.integers(0, 5),
    kind=st.sampled_from(["raster", "tiles", "clusters"]),
    sizes=st.tuples(st.sampled_from([16, 32]), st.sampled_from([32, 64])),
    ruled=st.sampled_from(["", "all", "some"]),
    seed=st.integers(0, 2**16),
)
def test_they_say_the_pairs_of_the_map(shape, text, kind, sizes, ruled, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = TokenGrid(*shape, text, "first" if text else "none")
    heads = 2 if seed % 2 else 1
    if kind == "clusters":
        labels = torch.randint(0, 3, (2, heads, grid.visual_length), generator=generator)
        layout, ruled = cluster_layout(grid, labels, 4), ""
    else:
        layout = raster_layout(grid, 1 + seed % 40) if kind == "raster" else tile_layout(grid, (2, 3, 5))
    visits = torch.rand(1, heads, layout.visual_count, layout.visual_count, generator=generator) < 0.5
    partial = torch.rand(visits.shape, generator=generator) < 0.5 if ruled == "some" else None
    rule = (Thirds() if seed % 3 else WithTable()) if ruled else None
    block_map = make_block_map(layout, visits, rule=rule, partial=partial)
    expected = block_map.to_mask()  # (B', K', N, M)
    for batch in range(expected.shape[0]):
        for head in range(expected.shape[1]):
            assert torch.equal(mask_of(block_map, *sizes, batch, head), expected[batch, head])


@pytest.mark.parametrize("size", [1, 4, 100])
def test_pieces_cover_blocks(size):
    labels = torch.tensor([[[0, 0, 0, 0, 0, 0, 2, 2], [1] * 8]])
    layout = cluster_layout(TokenGrid(1, 2, 4), labels, 4)
    pieces = cut(layout, size)
    for head in range(2):
        covered = [
            (block, token)
            for block, start, count in zip(
                *(x[0, head].tolist() for x in (pieces.block, pieces.start, pieces.size)), strict=True
            )
            for token in range(start, start + count)
        ]
        starts = layout.starts[0, head].tolist()
        assert covered == [(b, t) for b in range(4) for t in range(starts[b], starts[b + 1])]


def test_they_are_kept_with_the_map():
    block_map = make_block_map(raster_layout(TokenGrid(1, 4, 8), 16), torch.eye(2, dtype=torch.bool))
    assert lists_of(block_map, 16, 32) is lists_of(block_map, 16, 32)
    assert lists_of(block_map, 16, 32) is not lists_of(block_map, 32, 32)
