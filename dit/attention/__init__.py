"""Attention: the one call in `functional`, the implementations that can compute it in `backends`."""

from dit.attention.backends import AttentionBackend, attention_backend_table, register_backend
from dit.attention.functional import attention, attention_reference, log_sum_exp, merge_attention

__all__ = [
    "AttentionBackend",
    "attention",
    "attention_backend_table",
    "attention_reference",
    "log_sum_exp",
    "merge_attention",
    "register_backend",
]
