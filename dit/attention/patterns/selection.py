"""How online patterns choose blocks by scores: the largest, those with most of the mass, or those above a threshold.

Of equal scores the first block is chosen. A pair of blocks whose score is NaN or inf can't be judged: it is visited, so
that what attention makes of NaN and infinite queries and keys is what dense attention makes of them.
"""

from __future__ import annotations

from math import ceil, floor
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["ceil", "floor", "nearest"]


def budget(count: int, keep: float, rounding: Rounding = "ceil", multiple: int = 1) -> int:
    """Return how many of `count` blocks a share of them is: at least 1, at most all.

    Args:
        count: blocks.
        keep: share, 0 to 1.
        rounding: "ceil", "floor" or "nearest" (halves up), of the share of the blocks, taken to nine digits.
        multiple: rounded up to a multiple of it.

    Raises:
        ValueError: a share outside 0 to 1, or an unknown rounding.
    """
    check_share("keep", keep)
    exact = round(keep * count, 9)
    if rounding not in ("ceil", "floor", "nearest"):
        raise ValueError(f"rounding is {rounding!r}; use 'ceil', 'floor' or 'nearest'")
    chosen = {"ceil": ceil(exact), "floor": floor(exact), "nearest": floor(exact + 0.5)}[rounding]
    return min(max(-(-max(chosen, 1) // multiple) * multiple, 1), count)


def check_share(name: str, value: float) -> None:
    """Refuse a share outside 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; use a share from 0 to 1")


def known_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores with -inf for those that can't be judged, and which those are, bool."""
    unknown = scores.isnan() | scores.isposinf()
    return scores.masked_fill(unknown, -torch.inf), unknown


def choose_top(scores: Tensor, count: int | Tensor) -> Tensor:
    """Choose the largest scores of each row.

    Args:
        scores: (..., m).
        count: how many, from 1 to m; or (..., 1) for each row, from 0.

    Returns:
        bool, (..., m). Of scores that are equal the first ones are chosen; those that can't be judged are added.
    """
    known, unknown = known_scores(scores)
    if isinstance(count, int):
        if count >= scores.shape[-1]:
            return torch.ones_like(unknown)
        least = known.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)  # (..., 1)
    else:
        ranked = known.sort(dim=-1, descending=True).values  # (..., m)
        least = ranked.gather(-1, (count - 1).clamp(min=0).expand(*ranked.shape[:-1], 1))  # (..., 1)
    above, equal = known > least, known == least
    room = count - above.sum(-1, keepdim=True)  # (..., 1)
    return above | (equal & (equal.cumsum(-1) <= room)) | unknown


def choose_mass(probability: Tensor, p: float, *, crossing: bool = True, least: int = 1) -> Tensor:
    """Choose the largest probabilities of each row until their sum passes p (top-p).

    Args:
        probability: (..., m), not negative.
        p: 0 to 1; 1 chooses all.
        crossing: with the one with which the sum passes p, as SVG2, NABLA and Jenga do; False stops before it, as
            SpargeAttn does.
        least: how many are chosen at least.

    Returns:
        bool, (..., m); of equal probabilities the first ones. Those that can't be judged are added.
    """
    check_share("p", p)
    known, unknown = known_scores(probability)
    if p == 1:
        return torch.ones_like(unknown)
    ranked, order = known.sort(dim=-1, descending=True, stable=True)  # (..., m)
    mass = ranked.clamp(min=0).cumsum(-1)  # (..., m)
    wanted = mass <= p
    if crossing:  # the mass before each
        wanted = torch.cat([torch.ones_like(wanted[..., :1]), wanted[..., :-1]], dim=-1)
    wanted[..., :least] = True
    return torch.zeros_like(wanted).scatter_(-1, order, wanted) | unknown


def softmax_known(scores: Tensor) -> Tensor:
    """Return the softmax of each row over the scores that can be judged; NaN for others, zeros for rows without any."""
    known, unknown = known_scores(scores)
    probability = known.softmax(-1).nan_to_num(0)
    return probability.masked_fill(unknown, torch.nan)
