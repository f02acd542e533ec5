"""Corrections: what stands for the pairs of tokens that a block map leaves out.

    from dit.attention.corrections import CorrectionCall, correction

    fix = correction("pooled_tail", mode="row")
    out = fix(CorrectionCall(query, key, value, block_map, scale, sparse, dense, key_mask, step, state))

`sparse(tail=None, return_lse=False)` and `dense(return_lse=False)` compute the attention; a correction calls what it
needs. One that keeps something between steps (`keeps_state`) gets the step and a `StateEntry`, where it keeps it by
layer and branch; it calls `dense` itself at steps on which `must_refresh` says so, and returns exactly that result.
Which steps those are in a run is known in advance by `anchors(sigmas)`, how much a layer keeps by `kept_bytes(query)`.

| file | corrections |
|---|---|
| plain | `none` |
| pooled | `pooled_tail`: one pooled term for each block that isn't visited (the default) |
| linear | `linear_complement`: linear attention to the blocks that aren't visited; `linear`: to all, through a matrix |
| residual | `residual`, `ratio_residual`: what was missing at the last dense step |
"""

from dit.attention.corrections.contract import (
    CORRECTIONS,
    Correction,
    CorrectionCall,
    DenseCall,
    SparseCall,
    StateEntry,
    correction,
    correction_names,
    correction_type,
    register_correction,
)

__all__ = [
    "CORRECTIONS",
    "Correction",
    "CorrectionCall",
    "DenseCall",
    "SparseCall",
    "StateEntry",
    "correction",
    "correction_names",
    "correction_type",
    "register_correction",
]
