"""Attention: the one call in `functional`, its implementations in `backends`, and attention among chosen pairs.

A `TokenGrid` says what the tokens are, `pattern(name, grid)` which pairs of blocks to compute (a `BlockMap`), and
`block_sparse_attention` computes them. Files: `grid`, `layout` (orders of tokens), `block_map`, `patterns/` (one idea a
file), `kernels/` (one contract), `corrections/` (what stands for the pairs left out).

An `AttentionPlan` says what each layer and head of a network computes at each noise level, and `attach` has the network
do it; `search_plan` finds one. Files: `choices`, `plan`, `mechanism`, `planned_layer`, `decisions` (what a kind of call
computes), `map_cache`, `merged_map` (heads that differ in one launch), `survey`, `search`, `costs`. These names are
imported on first use, because they know networks, which import attention.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dit.attention.backends import AttentionBackend, attention_backend_table, register_backend
from dit.attention.block_map import BlockMap, TokenRule
from dit.attention.functional import attention, attention_reference, log_sum_exp, merge_attention
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import pattern, pattern_info, pattern_names
from dit.attention.sparse import block_sparse_attention

if TYPE_CHECKING:
    from dit.attention.choices import Choice, Guards
    from dit.attention.plan import AttentionPlan, PlanEntry
    from dit.attention.search import search_plan, survey_attention

_HOMES = {
    "AttentionPlan": "plan",
    "Choice": "choices",
    "Guards": "choices",
    "PlanEntry": "plan",
    "search_plan": "search",
    "survey_attention": "search",
}

__all__ = [
    "AttentionBackend",
    "AttentionPlan",
    "BlockMap",
    "Choice",
    "Guards",
    "Layout",
    "PlanEntry",
    "TokenGrid",
    "TokenRule",
    "attention",
    "attention_backend_table",
    "attention_reference",
    "block_sparse_attention",
    "log_sum_exp",
    "merge_attention",
    "pattern",
    "pattern_info",
    "pattern_names",
    "register_backend",
    "search_plan",
    "survey_attention",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"dit.attention.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
