"""Kernels of block-sparse attention: one contract, a table of what can run where.

A kernel computes exactly the pairs that a `BlockMap` says, forward and backward. `block_sparse_attention` in
`dit.attention.sparse` chooses among them; each is tested against `reference`.
"""
