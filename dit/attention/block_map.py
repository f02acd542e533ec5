"""BlockMap: which blocks of keys each block of queries visits, and which of their pairs count.

Everything that patterns say becomes a block map, and everything that kernels compute is told by one. `to_mask` is its
definition, pair by pair; kernels and densities are tested against it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dit.attention.layout import Layout

PAIRS_AT_ONCE = 2**25
"""Most pairs of tokens that a rule is asked for at a time."""


class TokenRule(ABC):
    """Which pairs of visual tokens attend, exactly; pairs with exact tokens always do."""

    @abstractmethod
    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether queries may look at keys.

        Args:
            query: raster indices among the visual tokens, of any shape that broadcasts with `key`.
            key: likewise.

        Returns:
            bool, the broadcast shape.
        """

    def block_counts(self, queries: Layout, keys: Layout) -> Tensor | None:
        """Return how many pairs attend between visual blocks, int64 (n, m), if asking for each pair can be spared.

        Args:
            queries: blocks of the queries.
            keys: blocks of the keys.

        Returns:
            The counts, or None where only the pairs themselves tell.
        """
        return None

    def of_head(self, head: int) -> TokenRule | None:
        """Return the rule of one head; None where all pairs count."""
        return self

    def of_heads(self, heads: slice | Tensor) -> TokenRule | None:
        """Return the rule of some heads."""
        return self


@dataclass(frozen=True)
class RulesByHead(TokenRule):
    """A rule for each head.

    Args:
        rules: of each head; None: all pairs count.
    """

    rules: tuple[TokenRule | None, ...]

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Refuse: heads differ.

        Raises:
            ValueError: always.
        """
        raise ValueError("heads have different rules here; ask of_head(number) for one of them")

    def of_head(self, head: int) -> TokenRule | None:
        """Return the rule of one head; None where all pairs count."""
        return self.rules[head]

    def of_heads(self, heads: slice | Tensor) -> TokenRule | None:
        """Return the rules of some heads."""
        numbers = range(len(self.rules))[heads] if isinstance(heads, slice) else heads.tolist()
        return RulesByHead(tuple(self.rules[number] for number in numbers))


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Pairs of blocks that are computed.

    Args:
        queries: order and blocks of the queries.
        keys: order and blocks of the keys.
        visits: bool, (B', K', n, m), whether a block of queries visits a block of keys; B' and K' are 1 where all
            samples or heads do alike.
        rule: which pairs count within visited blocks of visual tokens; None means all.
        partial: bool, as `visits`: the visited blocks in which `rule` must be asked; None means all of them. In others
            all pairs count.
        parts: the maps that this one was joined of, with the heads of each, all of them together those of this one;
            None for others. Kernels may prepare what they need of these.

    Raises:
        ValueError: shapes that don't fit.
    """

    queries: Layout
    keys: Layout
    visits: Tensor
    rule: TokenRule | None = None
    partial: Tensor | None = None
    parts: tuple[tuple[BlockMap, tuple[int, ...]], ...] | None = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What is found out, and what kernels prepare, once for a map."""

    def __post_init__(self) -> None:
        expected = (self.queries.count, self.keys.count)
        if self.visits.ndim != 4 or tuple(self.visits.shape[2:]) != expected or self.visits.dtype != torch.bool:
            raise ValueError(
                f"visits must be bool (B, K, {expected[0]}, {expected[1]}), got {self.visits.dtype} of shape "
                f"{tuple(self.visits.shape)}"
            )
        if self.partial is not None and self.partial.shape[2:] != self.visits.shape[2:]:
            raise ValueError(f"partial has the shape {tuple(self.partial.shape)}, visits {tuple(self.visits.shape)}")

    @property
    def is_shared(self) -> bool:
        """Whether all samples and heads have the same order, blocks and rule; they may visit other blocks."""
        return self.queries.is_shared and self.keys.is_shared and not isinstance(self.rule, RulesByHead)

    @property
    def is_dense(self) -> bool:
        """Whether every pair counts."""
        if "dense" not in self.cache:
            self.cache["dense"] = self.asks_nowhere and bool(self.visits.all())
        return self.cache["dense"]

    @property
    def asks_nowhere(self) -> bool:
        """Whether all pairs of visited blocks count, because there is no rule or no partial block."""
        if self.rule is None or self.partial is None:
            return self.rule is None
        if "asks" not in self.cache:
            self.cache["asks"] = bool(self.partial.any())
        return not self.cache["asks"]

    def density(self) -> float:
        """Return the share of pairs in visited blocks, over all samples and heads: what is computed."""
        return float(self.head_densities().mean())

    def head_densities(self) -> Tensor:
        """Return the share of pairs in visited blocks of each sample and head, (B', K')."""
        rows, columns = self.queries.sizes.double(), self.keys.sizes.double()  # (B', K', n), (B', K', m)
        visited = self.visits.double() @ columns[..., None].to(self.visits.device)  # (B', K', n, 1)
        pairs = (rows[..., None].to(self.visits.device) * visited).sum((-2, -1))  # (B', K')
        return pairs / (self.queries.grid.length * self.keys.grid.length)

    def token_density(self) -> float:
        """Return the share of pairs that count: what the rule asks for."""
        if self.asks_nowhere:
            return self.density()
        if self.is_shared:
            counts, sizes = self._counts(), self._sizes()  # (1, 1, n, m)
            if self.partial is not None:
                counts = torch.where(self.partial.cpu(), counts, sizes)
            pairs = (counts * self.visits.cpu()).sum((-2, -1)).double().mean()
            return float(pairs) / int(sizes.sum())
        total = self.queries.grid.length * self.keys.grid.length
        heads = self.visits.shape[0] * self.visits.shape[1]
        return sum(int(rows.sum()) for rows in self._mask_rows()) / (total * heads)

    def to_mask(self) -> Tensor:
        """Return every pair that counts in the order of the sequence, bool, (B', K', N, M)."""
        heads = torch.broadcast_shapes(self.visits.shape[:2], self.queries.order.shape[:2], self.keys.order.shape[:2])
        mask = torch.zeros(*heads, self.queries.grid.length, self.keys.grid.length, dtype=torch.bool)
        for batch in range(heads[0]):
            for head in range(heads[1]):
                mask[batch, head] = torch.cat(list(self._mask_rows_of(batch, head)))
        return mask

    def row_mask(self, rows: Tensor) -> Tensor:
        """Return which keys count for some queries, bool, (B', K', R, M).

        Args:
            rows: (R,), positions of the queries in the sequence.
        """
        return by_key(self.visited(rows), self.keys) & self._row_rule(rows)

    def visited(self, rows: Tensor) -> Tensor:
        """Return which blocks of keys some queries visit, bool, (B', K', R, m).

        Args:
            rows: (R,), positions of the queries in the sequence.
        """
        return self._of_rows(self.visits, rows)

    def _of_rows(self, of_blocks: Tensor, rows: Tensor) -> Tensor:
        """Give some queries (R,) what their blocks have, (B', K', n, m) to (B', K', R, m)."""
        blocks = self.queries.block_of().to(of_blocks.device)[..., rows]  # (B', K', R)
        heads = torch.broadcast_shapes(blocks.shape[:2], of_blocks.shape[:2])
        index = blocks.expand(*heads, -1)[..., None].expand(*heads, len(rows), of_blocks.shape[-1])
        return of_blocks.expand(*heads, -1, -1).gather(2, index)  # (B', K', R, m)

    def _row_rule(self, rows: Tensor) -> Tensor:
        """Return which keys the rule allows some queries (R,), True where it isn't asked, (B', K', R, M)."""
        if self.rule is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.device)
        index, keys = (_visual_index(one.grid).to(rows.device) for one in (self.queries, self.keys))
        query = index[rows][:, None]  # (R, 1)
        exact = (query < 0) | (keys < 0)  # (R, M)
        heads = range(len(self.rule.rules)) if isinstance(self.rule, RulesByHead) else (0,)
        rules = (self.rule.of_head(head) for head in heads)
        pairs = query.clamp(min=0), keys.clamp(min=0)[None]
        allowed = torch.stack([torch.ones_like(exact) if one is None else exact | one.allowed(*pairs) for one in rules])
        if self.partial is None:
            return allowed[None]  # (1, K', R, M)
        return allowed | ~by_key(self._of_rows(self.partial, rows), self.keys)

    def prune(self) -> BlockMap:
        """Find out by the rule which visited blocks have no pair that counts, or only such pairs.

        Returns:
            The map without the former, with `partial` set for what is neither.
        """
        if self.rule is None:
            return self
        counts, sizes = self._counts(), self._sizes()  # (1, 1, n, m)
        visits = self.visits & (counts > 0)
        return replace(self, visits=visits, partial=visits & (counts < sizes), parts=None, cache={})

    def for_heads(self, heads: slice | Tensor) -> BlockMap:
        """Return the map of some of the heads."""

        def some(x: Tensor) -> Tensor:
            return x if x.shape[1] == 1 else x[:, heads]

        queries = replace(self.queries, order=some(self.queries.order), starts=some(self.queries.starts))
        keys = replace(self.keys, order=some(self.keys.order), starts=some(self.keys.starts))
        partial = None if self.partial is None else some(self.partial)
        rule = None if self.rule is None else self.rule.of_heads(heads)
        changed: dict[str, Any] = {"rule": rule, "parts": None, "cache": {}}
        return replace(self, queries=queries, keys=keys, visits=some(self.visits), partial=partial, **changed)

    def to(self, device: torch.device | str) -> BlockMap:
        """Return the map with its tensors on a device."""
        queries, keys, visits = self.queries.to(device), self.keys.to(device), self.visits.to(device)
        if queries is self.queries and keys is self.keys and visits is self.visits:
            return self
        partial = None if self.partial is None else self.partial.to(device)
        return replace(self, queries=queries, keys=keys, visits=visits, partial=partial, parts=None, cache={})

    def _sizes(self) -> Tensor:
        """Return how many pairs each pair of blocks has, (B', K', n, m)."""
        return self.queries.sizes[..., None].cpu() * self.keys.sizes[..., None, :].cpu()

    def _counts(self) -> Tensor:
        """Return how many pairs of each pair of blocks the rule allows, (1, 1, n, m)."""
        if not self.is_shared:
            raise ValueError("a rule of tokens needs an order that all heads share")
        known = None if self.rule is None else self.rule.block_counts(self.queries, self.keys)
        if known is not None:
            counts = self._sizes()
            counts[0, 0, : known.shape[0], : known.shape[1]] = known
            return counts
        block_of_key = self.keys.block_of()[0, 0]  # (M,)
        block_of_query = self.queries.block_of()[0, 0]  # (N,)
        counts = torch.zeros(self.queries.count, self.keys.count, dtype=torch.int64)
        start = 0
        for rows in self._rule_rows():
            some = block_of_query[start : start + len(rows)]  # (R,)
            sums = torch.zeros(len(rows), self.keys.count, dtype=torch.int64)
            sums.index_add_(1, block_of_key, rows.long())  # (R, m)
            counts.index_add_(0, some, sums)
            start += len(rows)
        return counts[None, None]

    def _rule_rows(self, head: int = 0) -> Any:
        """Yield what the rule of a head allows, some queries at a time, (R, M), in the order of the sequence."""
        rule = None if self.rule is None else self.rule.of_head(head)
        grid_q, grid_k = self.queries.grid, self.keys.grid
        query, key = _visual_index(grid_q), _visual_index(grid_k)
        step = max(PAIRS_AT_ONCE // max(grid_k.length, 1), 1)
        for start in range(0, grid_q.length, step):
            some = query[start : start + step, None]  # (R, 1)
            exact = (some < 0) | (key < 0)  # (R, M)
            if rule is None:
                yield torch.ones_like(exact)
            else:
                yield exact | rule.allowed(some.clamp(min=0), key.clamp(min=0)[None])

    def _mask_rows_of(self, batch: int, head: int) -> Any:
        """Yield the pairs that count of a sample and head, some queries at a time, (R, M)."""
        blocks_q = _of_head(self.queries.block_of(), batch, head)  # (N,)
        blocks_k = _of_head(self.keys.block_of(), batch, head)  # (M,)
        visits = _of_head(self.visits, batch, head).cpu()  # (n, m)
        whole = torch.zeros_like(visits) if self.partial is None else ~_of_head(self.partial, batch, head).cpu()
        start = 0
        for rows in self._rule_rows(head):
            some = blocks_q[start : start + len(rows)]  # (R,)
            yield visits[some][:, blocks_k] & (rows | whole[some][:, blocks_k])
            start += len(rows)

    def _mask_rows(self) -> Any:
        for batch in range(self.visits.shape[0]):
            for head in range(self.visits.shape[1]):
                yield from self._mask_rows_of(batch, head)


def make_block_map(
    layout: Layout,
    visual_visits: Tensor,
    *,
    keys: Layout | None = None,
    rule: TokenRule | None = None,
    partial: Tensor | None = None,
) -> BlockMap:
    """Build a map from what the visual blocks visit: exact tokens see everything, and are seen by everything.

    Args:
        layout: of the queries.
        visual_visits: bool, (n, m) or (B', K', n, m), of the visual blocks only.
        keys: layout of the keys; None means that of the queries.
        rule: see `BlockMap`.
        partial: as `visual_visits`, see `BlockMap`.
    """
    keys = layout if keys is None else keys

    def padded(visual: Tensor, value: bool) -> Tensor:
        visual = visual[(None,) * (4 - visual.ndim)]  # (B', K', n, m)
        return torch.nn.functional.pad(visual, (0, keys.exact_blocks, 0, layout.exact_blocks), value=value)

    return BlockMap(
        layout, keys, padded(visual_visits, True), rule, None if partial is None else padded(partial, False)
    )


def make_rule_map(layout: Layout, rule: TokenRule, *, keys: Layout | None = None) -> BlockMap:
    """Build the map of all pairs that a rule allows: blocks without any aren't visited.

    Args:
        layout: of the queries.
        rule: the pairs; with `block_counts` the map is made quickly, otherwise every pair is asked for.
        keys: layout of the keys; None means that of the queries.
    """
    keys = layout if keys is None else keys
    counts = rule.block_counts(layout, keys)
    if counts is None:
        every = torch.ones(layout.visual_count, keys.visual_count, dtype=torch.bool)
        return make_block_map(layout, every, keys=keys, rule=rule).prune()
    sizes = layout.sizes[0, 0, : layout.visual_count, None] * keys.sizes[0, 0, : keys.visual_count]  # (n, m)
    visits = counts > 0
    return make_block_map(layout, visits, keys=keys, rule=rule, partial=visits & (counts < sizes))


def by_key(of_blocks: Tensor, layout: Layout) -> Tensor:
    """Give each key what belongs to its block: (B', K', R, m) to (B', K', R, M)."""
    blocks = layout.block_of().to(of_blocks.device)[..., None, :]  # (B', K', 1, M)
    heads = torch.broadcast_shapes(blocks.shape[:2], of_blocks.shape[:2])
    index = blocks.expand(*heads, of_blocks.shape[2], -1)
    return of_blocks.expand(*heads, -1, -1).gather(3, index)  # (B', K', R, M)


def _visual_index(grid: Any) -> Tensor:
    """Return the raster index of each token of the sequence among the visual ones, -1 for exact tokens, (N,)."""
    index = torch.full((grid.length,), -1, dtype=torch.int64)
    index[grid.visual_start : grid.visual_start + grid.visual_length] = torch.arange(grid.visual_length)
    return index


def _of_head(x: Tensor, batch: int, head: int) -> Tensor:
    """Return the part of a sample and head where they share it or not."""
    return x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)]
