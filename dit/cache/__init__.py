"""KV caches of next-scale models."""

from dit.cache.buffers import Attend
from dit.cache.calibration import KVCalibrator, KVProfile
from dit.cache.kv_cache import KVReport, Observer, ScaleKVCache
from dit.cache.plan import POLICIES, CachePlan, find_table, plan_cache
from dit.cache.storage import KV_DTYPES

__all__ = [
    "KV_DTYPES",
    "POLICIES",
    "Attend",
    "CachePlan",
    "KVCalibrator",
    "KVProfile",
    "KVReport",
    "Observer",
    "ScaleKVCache",
    "find_table",
    "plan_cache",
]
