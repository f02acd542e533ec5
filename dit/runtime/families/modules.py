"""Classify modules by their structure."""

from torch import nn


def is_attention(module: nn.Module) -> bool:
    """Return whether a module projects queries, keys and values, in diffusers' names."""
    children = module._modules
    triples = (("to_q", "to_k", "to_v"), ("to_query", "to_key", "to_value"))
    separate = any(all(isinstance(children.get(name), nn.Module) for name in triple) for triple in triples)
    return separate or any(name in children for name in ("to_qkv", "to_qkv_mlp_proj"))
