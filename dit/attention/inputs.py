"""One attention call as a network makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class CallKind(NamedTuple):
    """What of a call decides what it computes, besides step and grid.

    Args:
        shape: (B, N, K, E) of the queries.
        keys: their number M.
        dtype: of the queries.
        device: likewise.
        is_plain: neither causal nor with dropout.
    """

    shape: torch.Size
    keys: int
    dtype: torch.dtype
    device: torch.device
    is_plain: bool


@dataclass(frozen=True, eq=False)
class Inputs:
    """One attention call.

    Args:
        query: (B, N, K, E).
        key: (B, M, K, E).
        value: (B, M, K, E).
        attn_mask: as the network gives it.
        dropout_p: of the network's call.
        is_causal: likewise.
        scale: factor of the scores; None is 1 / sqrt(E).
        enable_gqa: keys have fewer heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Any = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def kind(self) -> CallKind:
        """What decides what the call computes."""
        query = self.query
        is_plain = not self.is_causal and not self.dropout_p
        return CallKind(query.shape, self.key.shape[1], query.dtype, query.device, is_plain)

    @property
    def factor(self) -> float:
        """Factor of the scores."""
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def of_heads(self, heads: Sequence[int]) -> Inputs:
        """Return the call of some heads, rising; keys must have as many as queries. Nothing is copied for a run."""
        if len(heads) == self.query.shape[2]:
            return self
        query, key, value = (pick_heads(x, heads) for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def with_all_heads(self) -> Inputs:
        """Return the call with as many heads of keys as of queries."""
        copies = self.query.shape[2] // self.key.shape[2]
        if copies == 1:
            return replace(self, enable_gqa=False) if self.enable_gqa else self
        key, value = (x.repeat_interleave(copies, dim=2) for x in (self.key, self.value))
        return replace(self, key=key, value=value, enable_gqa=False)


def pick_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Return some heads of (B, N, K, E), rising; a view where they lie at equal distances."""
    run = head_slice(heads)
    return x[:, :, run] if run is not None else x.index_select(2, torch.tensor(heads, device=x.device))


def head_slice(heads: Sequence[int]) -> slice | None:
    """Return heads, rising, as a slice; None where they lie at unequal distances."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    run = range(heads[0], heads[-1] + 1, step)
    return slice(run.start, run.stop, step) if list(run) == list(heads) else None
