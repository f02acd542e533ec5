"""Random calls of online patterns, and blocks of their layouts as plain lists, for slow definitions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from dit.attention import BlockMap, Layout, TokenGrid
from dit.attention.layout import make_layout


@dataclass(frozen=True)
class Case:
    """A grid with queries and keys (B, N, K, E), and parameters that choose blocks."""

    grid: TokenGrid
    query: Tensor
    key: Tensor
    where: dict


def random_case(seed: int, frames: int, height: int, width: int, text: int, position: str, extra: int) -> Case:
    """Make a case: two samples or one, two heads, eight channels; keys resemble queries so that scores differ."""
    grid = TokenGrid(frames, height, width, text, position if text else "none", extra)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1 + seed % 2, grid.length, 2, 8, generator=generator) * 1.5
    key = torch.randn(query.shape, generator=generator) + 0.5 * query
    return Case(grid, query, key, {})


@st.composite
def cases(draw: st.DrawFn, key_blocks: bool = True, layouts: tuple[str, ...] = ()) -> Case:
    """Draw a small grid, with text first, last or without, and a layout of any kind."""
    size = st.integers(1, 5)
    case = random_case(
        draw(st.integers(0, 10**6)),
        *(draw(size) for _ in range(3)),
        text=draw(st.integers(0, 4)),
        position=draw(st.sampled_from(["first", "last"])),
        extra=draw(st.integers(0, 2)),
    )
    name = draw(st.sampled_from(layouts or ("raster", "hwt", "morton", "hilbert", "frames", "tile", "own")))
    if name == "own":
        return Case(case.grid, case.query, case.key, {"layout": own_layout(case.grid, draw(st.integers(0, 99)))})
    if name == "tile":
        tile = tuple(draw(st.integers(1, 3)) for _ in range(3))
        return Case(case.grid, case.query, case.key, {"layout": "tile", "tile": tile})
    where = {"layout": name, "block": draw(st.integers(1, 9))}
    if key_blocks:
        where["key_block"] = draw(st.sampled_from([None, 2, 5]))
    return Case(case.grid, case.query, case.key, where)


def own_layout(grid: TokenGrid, seed: int) -> Layout:
    """Make a layout of random blocks, empty ones among them, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(grid.visual_length, generator=generator)
    cuts = torch.randint(0, grid.visual_length + 1, (4,), generator=generator).sort().values
    sizes = torch.cat([cuts, torch.tensor([grid.visual_length])]).diff(prepend=torch.tensor([0]))
    return make_layout(grid, order, sizes, exact_block=3)


def visual_blocks(layout: Layout, batch: int = 0, head: int = 0) -> list[list[int]]:
    """Return the positions of the tokens of each visual block."""
    order = layout.order[min(batch, layout.order.shape[0] - 1), min(head, layout.order.shape[1] - 1)].tolist()
    starts = layout.starts[min(batch, layout.starts.shape[0] - 1), min(head, layout.starts.shape[1] - 1)].tolist()
    return [order[starts[index] : starts[index + 1]] for index in range(layout.visual_count)]


def visual_visits(block_map: BlockMap) -> Tensor:
    """Return the visits between visual blocks, and check that exact ones see and are seen by all."""
    rows, columns = block_map.queries.visual_count, block_map.keys.visual_count
    assert bool(block_map.visits[:, :, rows:].all())
    assert bool(block_map.visits[..., columns:].all())
    return block_map.visits[:, :, :rows, :columns]


def pooled_scores(case: Case, queries: list[list[int]], keys: list[list[int]], mask: Tensor | None = None) -> Tensor:
    """Return the scores of the means of blocks, (B, K, n, m), float64, one pair at a time."""
    batch, _, heads, width = case.query.shape
    scores = torch.full((batch, heads, len(queries), len(keys)), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i, rows in enumerate(queries):
                for j, columns in enumerate(keys):
                    rows_there, columns_there = (
                        [one for one in some if mask is None or mask[b, one]] for some in (rows, columns)
                    )
                    if not columns_there:
                        continue
                    left = mean(case.query[b, :, h], rows_there)
                    scores[b, h, i, j] = left @ mean(case.key[b, :, h], columns_there) / width**0.5
    return scores


def mean(x: Tensor, positions: list[int]) -> Tensor:
    """Return the mean of some rows (N, E), zeros of none."""
    if not positions:
        return torch.zeros(x.shape[1], dtype=torch.float64)
    return sum(x[one].double() for one in positions) / len(positions)  # pyright: ignore[reportReturnType]


def best(row: Tensor, count: int) -> list[int]:
    """Return the columns of the largest numbers of a row, of equal ones the first."""
    return sorted(range(len(row)), key=lambda column: (-float(row[column]), column))[:count]


def best_mass(row: Tensor, p: float, crossing: bool = True, least: int = 1) -> list[int]:
    """Return the columns of the largest probabilities while what was taken before (or with it) is within p."""
    chosen, mass = [], 0.0
    for column in best(row, len(row)):
        if len(chosen) >= least and (mass if crossing else mass + float(row[column])) > p:
            break
        chosen.append(column)
        mass += float(row[column])
    return chosen
