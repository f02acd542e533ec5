"""Attention masks of networks, read as what block-sparse attention takes: which keys nobody may look at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit.attention.choices import StaysDense

HIDDEN = -1e3
"""Added to a score, this or less hides a key."""


class KeyMask(NamedTuple):
    """A mask of keys.

    Args:
        keys: bool, (B, M), False for keys that nobody may look at; None: all may be looked at.
        rows: bool, (B, N), False for queries that look nowhere; None: there is none.
    """

    keys: Tensor | None
    rows: Tensor | None


def read_mask(mask: Tensor | None, queries: int, keys: int, batch: int) -> KeyMask:
    """Read a mask as a mask of keys.

    Known are masks of keys alone, (B, M), (B, 1, 1, M) or expanded from that, and products of a mask of queries and of
    the same mask of keys, (B, 1, N, N), as networks make them that mask padded text on both sides.

    Args:
        mask: bool, True where a query may look; or what is added to the scores.
        queries: their number N.
        keys: their number M.
        batch: samples B.

    Raises:
        StaysDense: it is another mask.
    """
    if mask is None:
        return KeyMask(None, None)
    if mask.dtype != torch.bool:
        hidden = mask <= HIDDEN
        if not bool(((mask == 0) | hidden).all()):
            raise StaysDense("the mask has values")
        mask = ~hidden
    if mask.ndim == 2 and mask.shape in ((batch, keys), (1, keys)) and (queries != keys or batch != queries):
        mask = mask[:, None, None]
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[-1] != keys or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, queries):
        raise StaysDense("the mask has another shape")
    if mask.shape[1] != 1 and not bool((mask == mask[:, :1]).all()):
        raise StaysDense("the mask differs by head")
    mask = mask[:, 0].expand(batch, -1, -1)  # (B, 1 or N, M)
    if mask.shape[1] == 1 or mask.stride(1) == 0:
        return _checked(mask[:, 0], None)
    live = mask.any(1)  # (B, M)
    rows = mask.any(2)  # (B, N)
    if not torch.equal(mask, live[:, None] & rows[:, :, None]):
        raise StaysDense("the mask is of pairs")
    return _checked(live, None if bool(rows.all()) else rows)


def _checked(keys: Tensor, rows: Tensor | None) -> KeyMask:
    if bool(keys.all()):
        return KeyMask(None, rows)
    if not bool(keys.any(-1).all()):
        raise StaysDense("a sample has no key")
    return KeyMask(keys, rows)
