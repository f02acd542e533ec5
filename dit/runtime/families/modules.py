"""Classify modules by their structure."""

from torch import nn


def is_attention(module: nn.Module) -> bool:
    """Return whether a module projects queries, keys and values, in diffusers' names."""
    children = module._modules
    separate = all(isinstance(children.get(name), nn.Module) for name in ("to_q", "to_k", "to_v"))
    return separate or any(name in children for name in ("to_qkv", "to_qkv_mlp_proj"))
