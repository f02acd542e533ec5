"""Patterns: rules by name that turn a grid of tokens, or queries and keys, into a block map.

A static pattern is a function `f(grid, **params) -> BlockMap`; an online one `f(grid, query, key, **params)`, with
query and key (B, N, K, E) in the order of the sequence. `pattern(name, grid, ...)` calls either. Each file holds one
idea and registers its patterns on import; the files are imported at the first look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from inspect import signature
from typing import Any

from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.grid import TokenGrid

MODULES: dict[str, tuple[str, ...]] = {
    "simple": ("dense", "skip"),
    "neighborhood": ("neighborhood",),
    "sliding_tile": ("sliding_tile",),
    "radial": ("radial",),
    "sparse_vdit": ("diagonal", "multi_diagonal", "vertical_stripe"),
    "in_frame_band": ("in_frame_band",),
    "sparse_videogen": ("svg_spatial", "svg_temporal"),
    "lvsa": ("lvsa",),
    "paro": ("paro",),
    "trained": ("coarse_gate", "sla", "dma", "proxy"),
    "pooled": ("pooled_topk", "pooled_topp", "topk_topp"),
    "antidiagonal": ("antidiagonal",),
    "sale": ("sale",),
    "sol": ("sol",),
    "subblock": ("subblock",),
    "draft": ("draft",),
    "cube": ("cube",),
    "svg": ("svg",),
    "svg2": ("svg2",),
    "vertical_slash": ("vertical_slash",),
    "skip_softmax": ("skip_softmax",),
}
"""Files of this folder, and the patterns that each one registers."""

STEP = "step"
"""The value of a parameter that follows the number of the step."""

_PATTERNS: dict[str, PatternInfo] = {}


@dataclass(frozen=True)
class PatternInfo:
    """A pattern.

    Args:
        name: as `pattern` takes it.
        function: what computes the block map.
        summary: first line of its documentation.
        paper: where it was published, e.g. "arXiv 2502.04507"; empty for common knowledge.
        online: it looks at queries and keys.
        turns: says of a grid after how many steps a pattern repeats that follows them; None: none does.
    """

    name: str
    function: Callable[..., BlockMap]
    summary: str
    paper: str
    online: bool
    turns: Callable[[TokenGrid], int] | None = None

    def follows_step(self, params: Mapping[str, Any]) -> bool:
        """Return whether the pattern with these parameters changes with the number of the step: one is "step"."""
        return self.turns is not None and STEP in params.values()

    def period_of(self, grid: TokenGrid, params: Mapping[str, Any]) -> int:
        """Return after how many steps the pattern repeats; 1 where it is always the same."""
        return self.turns(grid) if self.turns is not None and self.follows_step(params) else 1

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Names of the parameters with their defaults; those without one have `inspect.Parameter.empty`."""
        known = signature(self.function).parameters
        return {name: one.default for name, one in known.items() if name not in ("grid", "query", "key")}


def register_pattern(
    name: str, *, paper: str = "", online: bool = False, turns: Callable[[TokenGrid], int] | None = None
) -> Callable[..., Any]:
    """Register a function as the pattern of that name; a decorator.

    Args:
        name: lower case.
        paper: where it was published.
        online: it takes query and key.
        turns: see `PatternInfo`; the function then takes `step`, the number of the step, and "step" for a parameter
            that follows it.
    """

    def register(function: Callable[..., BlockMap]) -> Callable[..., BlockMap]:
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        _PATTERNS[name] = PatternInfo(name, function, summary, paper, online, turns)
        return function

    return register


def pattern_names() -> list[str]:
    """Return the names of all patterns."""
    return sorted(name for names in MODULES.values() for name in names)


def pattern_info(name: str) -> PatternInfo:
    """Return what is known of a pattern.

    Raises:
        ValueError: there is none of this name.
    """
    home = next((module for module, names in MODULES.items() if name in names), None)
    if home is None:
        raise ValueError(f"there is no attention pattern {name!r}; use one of {', '.join(pattern_names())}")
    import_module(f"{__name__}.{home}")
    return _PATTERNS[name]


def pattern(
    name: str, grid: TokenGrid, *, query: Tensor | None = None, key: Tensor | None = None, **params: Any
) -> BlockMap:
    """Compute the block map of a pattern.

    Args:
        name: one of `pattern_names()`.
        grid: the tokens.
        query: (B, N, K, E) in the order of the sequence, for patterns that look at it.
        key: likewise.
        **params: of the pattern, see `pattern_info(name).parameters`.

    Raises:
        ValueError: an unknown pattern or parameter, or one that needs queries and keys and gets none.
    """
    info = pattern_info(name)
    unknown = sorted(set(params) - set(info.parameters))
    if unknown:
        accepted = ", ".join(info.parameters) or "no parameters"
        raise ValueError(f"pattern {name!r} takes no {', '.join(unknown)}; it takes {accepted}")
    if not info.online:
        return info.function(grid, **params)
    if query is None or key is None:
        raise ValueError(f"pattern {name!r} chooses by queries and keys: give query and key, (B, N, K, E)")
    if query.shape[1] != grid.length or key.shape[1] != grid.length:
        raise ValueError(f"query and key have {query.shape[1]} and {key.shape[1]} tokens, the grid has {grid.length}")
    return info.function(grid, query, key, **params)


__all__ = ["MODULES", "PatternInfo", "pattern", "pattern_info", "pattern_names", "register_pattern"]
