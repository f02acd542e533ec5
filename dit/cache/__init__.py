"""Keys and values that next-scale models keep between scales."""

from dit.cache.kv_cache import POLICIES, ScaleKVCache

__all__ = ["POLICIES", "ScaleKVCache"]
