"""Block maps of groups of heads joined into one map of all of them, so that they are computed together.

Heads of a plan may differ in everything: order, blocks, visits, rule. A block map has room for that: orders and blocks
by head, where those with fewer blocks get empty ones, which nobody visits and nothing stands for; visits by head; a
rule by head. The joined map computes exactly the pairs that its parts compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, RulesByHead, TokenRule
from dit.attention.layout import Layout
from dit.attention.sparse import AUTOMATIC

ANY_MAP = ("gather", "reference")
"""Kernels that compute all joined maps; Triton's those without a rule whose parts have as many blocks, others none."""


def can_merge(maps: Sequence[BlockMap], kernel: str, device: torch.device) -> bool:
    """Return whether a kernel computes the joined map of some maps as it computes these.

    Args:
        maps: of groups of heads of one call.
        kernel: see `dit.attention.sparse.block_sparse_attention`.
        device: of the call.
    """
    if any(one.queries.grid != maps[0].queries.grid or one.keys.grid != maps[0].keys.grid for one in maps):
        return False
    name = AUTOMATIC.get(device.type, ("reference",))[0] if kernel == "auto" else kernel
    if name in ANY_MAP:
        return True
    shapes = {(one.queries.count, one.queries.exact_blocks, one.keys.count, one.keys.exact_blocks) for one in maps}
    return name.startswith("triton") and len(shapes) == 1 and all(one.asks_nowhere for one in maps)


def merge_heads(maps: Sequence[BlockMap], heads: Sequence[Sequence[int]]) -> BlockMap:
    """Join maps of groups of heads.

    Args:
        maps: of the same tokens on one device; B' and K' of each are 1, the batch, or the number of its heads.
        heads: of each map, in the order of its K'.

    Returns:
        The map of all these heads in rising order.

    Raises:
        ValueError: maps of other tokens, or heads that don't fit.
    """
    numbers = [head for group in heads for head in group]
    if not maps or len(maps) != len(heads) or len(set(numbers)) != len(numbers):
        raise ValueError(f"{len(maps)} maps and the heads {[list(group) for group in heads]}: give as many groups as "
                         "maps, and each head once")  # fmt: skip
    for one, group in zip(maps, heads, strict=True):
        if one.queries.grid != maps[0].queries.grid or one.keys.grid != maps[0].keys.grid:
            raise ValueError(f"maps of {one.queries.grid} and {maps[0].queries.grid} can't be joined")
        if one.visits.shape[1] not in (1, len(group)):
            raise ValueError(f"a map of {one.visits.shape[1]} heads doesn't fit the heads {list(group)}")
    sizes = tuple(map(len, heads))
    order = tuple(sorted(range(len(numbers)), key=numbers.__getitem__))  # rank of each head among all given ones
    queries, keys = (_join_layouts(tuple(one), sizes, order) for one in zip(*((m.queries, m.keys) for m in maps),
                                                                             strict=True))  # fmt: skip
    places = {head: place for place, head in enumerate(sorted(numbers))}
    owners = [number for number, size in enumerate(sizes) for _ in range(size)]
    rules = [None if one.asks_nowhere else one.rule for one in maps]
    partial = None
    if any(rule is not None for rule in rules):
        asked = [_pad(_asked(one, rule), one, queries, keys) for one, rule in zip(maps, rules, strict=True)]
        partial = _join(asked, sizes, order)
    return BlockMap(
        queries,
        keys,
        _join([_pad(one.visits, one, queries, keys) for one in maps], sizes, order),
        _join_rules([rules[owners[rank]] for rank in order]),
        partial,
        tuple((one, tuple(places[head] for head in group)) for one, group in zip(maps, heads, strict=True)),
    )


def _join_rules(rules: list[TokenRule | None]) -> TokenRule | None:
    """Return one rule for heads with these; heads without one are asked nowhere."""
    different = {id(one): one for one in rules if one is not None}
    return RulesByHead(tuple(rules)) if len(different) > 1 else next(iter(different.values()), None)


def _asked(block_map: BlockMap, rule: TokenRule | None) -> Tensor:
    """Return the visited blocks in which a rule is asked, bool, (B', K', n, m)."""
    if rule is None:
        return torch.zeros_like(block_map.visits)
    if block_map.partial is not None:
        return block_map.visits & block_map.partial
    asked = block_map.visits.clone()
    asked[..., block_map.queries.visual_count :, :] = False
    asked[..., block_map.keys.visual_count :] = False
    return asked


def _join_layouts(layouts: tuple[Layout, ...], sizes: tuple[int, ...], order: tuple[int, ...]) -> Layout:
    if all(one is layouts[0] for one in layouts) and layouts[0].is_shared:
        return layouts[0]
    make = _kept_layout if all(one.is_shared for one in layouts) else _make_layout
    return make(layouts, sizes, order)


def _make_layout(layouts: tuple[Layout, ...], sizes: tuple[int, ...], order: tuple[int, ...]) -> Layout:
    """Return the layout of heads with these, empty blocks at the end of the visual and of the exact ones."""
    visual, exact = max(one.visual_count for one in layouts), max(one.exact_blocks for one in layouts)
    starts = []
    for one in layouts:
        first, last = one.starts[..., : one.visual_count + 1], one.starts[..., one.visual_count + 1 :]
        first = torch.cat([first, first[..., -1:].expand(*first.shape[:2], visual - one.visual_count)], dim=-1)
        first = torch.cat([first, last], dim=-1)
        starts.append(torch.cat([first, first[..., -1:].expand(*first.shape[:2], exact - one.exact_blocks)], dim=-1))
    places = [one.order for one in layouts]
    return Layout(layouts[0].grid, _join(places, sizes, order), _join(starts, sizes, order), exact)


@lru_cache(maxsize=64)
def _kept_layout(layouts: tuple[Layout, ...], sizes: tuple[int, ...], order: tuple[int, ...]) -> Layout:
    """Return `_make_layout` of layouts that come again: those that don't depend on queries and keys."""
    return _make_layout(layouts, sizes, order)


def _pad(of_blocks: Tensor, block_map: BlockMap, queries: Layout, keys: Layout) -> Tensor:
    """Give a map's blocks (B', K', n, m) the places that they have in larger layouts, False for the others."""
    before, after = block_map.queries, block_map.keys
    if all((a.count, a.exact_blocks) == (b.count, b.exact_blocks) for a, b in ((before, queries), (after, keys))):
        return of_blocks
    padded = of_blocks.new_zeros(*of_blocks.shape[:2], queries.count, keys.count)
    for rows, wide_rows in _segments(before, queries):
        for columns, wide_columns in _segments(after, keys):
            padded[..., wide_rows, wide_columns] = of_blocks[..., rows, columns]
    return padded


def _segments(layout: Layout, wider: Layout) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return where the visual and the exact blocks of a layout are, and where in a wider one."""
    exact = slice(wider.visual_count, wider.visual_count + layout.exact_blocks)
    visual = slice(0, layout.visual_count)
    return (visual, visual), (slice(layout.visual_count, layout.count), exact)


def _join(parts: Sequence[Tensor], sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Join (B', K', ...) of groups of heads into (B', K, ...) in an order of all heads."""
    batch = max(one.shape[0] for one in parts)
    rows = [one.expand(batch, size, *one.shape[2:]) for one, size in zip(parts, sizes, strict=True)]
    joined = torch.cat(rows, dim=1)
    if list(order) == sorted(order):
        return joined
    return joined.index_select(1, torch.tensor(order, device=joined.device))


__all__ = ["can_merge", "merge_heads"]
