"""BandRule: pairs of tokens that lie close to each other on one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit.attention.block_map import TokenRule
from dit.attention.layout import Layout


@dataclass(frozen=True, eq=False)
class BandRule(TokenRule):
    """Pairs whose places on a line are at most `reach` apart, and all pairs with keys at the places below `sink`.

    Args:
        places: (T H W,), the place of each visual token; several tokens may share one.
        reach: most distance of two tokens that attend.
        sink: keys at places below are seen by all queries.
    """

    places: Tensor
    reach: int
    sink: int = 0

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether a key is near its query or in the sink."""
        places = self.places.to(query.device)
        query, key = places[query], places[key]
        return ((query - key).abs() <= self.reach) | (key < self.sink)

    def block_counts(self, queries: Layout, keys: Layout) -> Tensor | None:
        """Return the allowed pairs between blocks, (n, m), if the keys stand in the order of their places."""
        if not (queries.is_shared and keys.is_shared):
            return None
        line = self._line(keys)  # (N,), the places of the keys in their order
        if bool((line.diff() < 0).any()):
            return None
        # 1. every query sees one run of keys around it, and one from the first key on
        places = self._line(queries)  # (N,)
        first = torch.searchsorted(line, places - self.reach)  # (N,)
        end = torch.searchsorted(line, places + self.reach, right=True)  # (N,)
        sink = int((line < self.sink).sum())
        first = first.clamp(min=sink)  # the keys in both runs count once
        # 2. of which so many lie in each block
        starts = keys.starts[0, 0, : keys.visual_count + 1].cpu()  # (m + 1,)
        in_sink = starts.clamp(max=sink).diff()  # (m,)
        sizes = queries.sizes[0, 0, : queries.visual_count].cpu()  # (n,)
        counts = sizes[:, None] * in_sink  # (n, m)
        for block, run in enumerate(torch.stack([first, torch.maximum(first, end)], -1).split(sizes.tolist())):
            if not len(run):
                continue
            # the key blocks that the runs of this block of queries, (R, 2), reach into
            begin = int(torch.searchsorted(starts, run[:, 0].min(), right=True)) - 1
            stop = int(torch.searchsorted(starts, run[:, 1].max()))
            low, high = starts[begin:stop], starts[begin + 1 : stop + 1]  # (m',)
            inside = torch.minimum(run[:, 1:], high) - torch.maximum(run[:, :1], low)  # (R, m')
            counts[block, begin:stop] += inside.clamp(min=0).sum(0)
        return counts

    def _line(self, layout: Layout) -> Tensor:
        """Return the places of the visual tokens in the order of a layout, (T H W,)."""
        grid = layout.grid
        return self.places[layout.order[0, 0, : grid.visual_length].cpu() - grid.visual_start]
