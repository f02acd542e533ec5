"""Attention: the one call in `functional`, its implementations in `backends`, and attention among chosen pairs.

A `TokenGrid` says what the tokens are, `pattern(name, grid)` which pairs of blocks to compute (a `BlockMap`), and
`block_sparse_attention` computes them. Files: `grid`, `layout` (orders of tokens), `block_map`, `patterns/` (one idea a
file), `kernels/` (one contract), `corrections` (what stands for the pairs left out).
"""

from dit.attention.backends import AttentionBackend, attention_backend_table, register_backend
from dit.attention.block_map import BlockMap, TokenRule
from dit.attention.functional import attention, attention_reference, log_sum_exp, merge_attention
from dit.attention.grid import TokenGrid
from dit.attention.layout import Layout
from dit.attention.patterns import pattern, pattern_info, pattern_names
from dit.attention.sparse import block_sparse_attention

__all__ = [
    "AttentionBackend",
    "BlockMap",
    "Layout",
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
]
