"""What attention costs on this machine, and whether leaving pairs out pays.

`measure_attention_costs()` takes some seconds and is kept in the user's cache folder; without it typical values stand
in. All kernels divide their work alike over threads, so times of one thread decide.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.kernels import products
from dit.attention.kernels.native import attend_native
from dit.attention.kernels.rows import has_fast_onednn
from dit.attention.layout import raster_layout
from dit.runtime.cost_model import cache_path, machine_key
from dit.runtime.timing import measure

WIDTHS = (64, 128)
"""Head widths that are measured; others lie on the line through them."""
TOKENS, HEADS = 1024, 4
LAUNCH_SECONDS = 8e-4
"""What heads that are computed together cost for each call, whatever they compute."""
GROUP_SECONDS = {False: 5e-5, True: 6e-4}
"""What each choice among them costs: looking up its map, or with True choosing blocks."""
MARGIN = 0.9
"""Sparse attention must be predicted to take less than this share of the time of dense attention."""


@dataclass(frozen=True)
class AttentionCosts:
    """Costs of attention on one machine.

    Args:
        machine: processor and version of torch; "typical" for values that were not.
        pair: nanoseconds of a query, key and head: (head width 64, 128) by "kernel dtype", for "native" (torch's),
            "products" and "sparse" (the kernel that `block_sparse_attention` takes).
        block: microseconds of a block of queries of sparse attention, whatever it visits.
        fresh: microseconds of a block of a map that is made anew for each call: its keys have to be listed.
    """

    machine: str
    pair: Mapping[str, tuple[float, float]]
    block: float
    fresh: float = 20.0

    def of_pair(self, kernel: str, dtype: torch.dtype, width: int) -> float | None:
        """Return the seconds of a pair and head; None for what was not measured."""
        known = self.pair.get(f"{kernel} {str(dtype).removeprefix('torch.')}")
        if known is None:
            return None
        slope = (known[1] - known[0]) / (WIDTHS[1] - WIDTHS[0])
        return max(known[0] + slope * (width - WIDTHS[0]), 0.25 * known[0]) * 1e-9

    def dense_seconds(self, query: Tensor, keys: int) -> float | None:
        """Return the time of dense attention by the fastest kernel here.

        Args:
            query: (B, N, K, E); only shape and dtype are read.
            keys: their number M.
        """
        batch, length, heads, width = query.shape
        kernels = ("native", "products") if products.has_fast_products(query.dtype) else ("native",)
        costs = [self.of_pair(kernel, query.dtype, width) for kernel in kernels]
        known = [cost for cost in costs if cost is not None]
        return min(known) * batch * heads * length * keys if known else None

    def sparse_seconds(self, query: Tensor, block_map: BlockMap, online: bool = False) -> float | None:
        """Return the time of a block map.

        Args:
            query: (B, N, K, E); only shape and dtype are read.
            block_map: the pairs.
            online: the map is made anew for each call.
        """
        batch, length, heads, width = query.shape
        cost = self.of_pair("sparse", query.dtype, width)
        if cost is None:
            return None
        if "density" not in block_map.cache:
            block_map.cache["density"] = block_map.density()
        pairs = block_map.cache["density"] * length * block_map.keys.grid.length
        each = self.block + (self.fresh if online else 0.0)
        return batch * heads * (pairs * cost + block_map.queries.count * each * 1e-6)

    def group_seconds(
        self, query: Tensor, heads: int, keys: int, density: float, blocks: int, online: bool
    ) -> float | None:
        """Return the time of some heads under one choice of a plan, with what is done once for them.

        Args:
            query: (B, N, K, E); only shape and dtype are read.
            heads: how many of the K.
            keys: their number M.
            density: share of the pairs that is computed.
            blocks: of queries.
            online: the map is made anew for each call.
        """
        cost = self.of_pair("sparse", query.dtype, query.shape[-1])
        if cost is None:
            return None
        each = blocks * (self.block + (self.fresh if online else 0.0)) * 1e-6
        pairs = density * query.shape[1] * keys
        return GROUP_SECONDS[online] + query.shape[0] * heads * (pairs * cost + each)

    def save(self, path: Path | None = None) -> Path:
        """Write the costs as JSON and return where; None is the user's cache folder."""
        path = path or _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": self.machine, "pair": dict(self.pair), "block": self.block}
        path.write_text(json.dumps(content, indent=1))
        _kept.cache_clear()
        return path


TYPICAL = {
    "cpu": AttentionCosts(
        "typical",  # an AMD EPYC whose units are 512 bits wide, one thread
        {
            "native float32": (2.85, 5.3),
            "native bfloat16": (2.95, 5.5),
            "products float32": (1.8, 3.0),
            "products bfloat16": (1.25, 1.9),
            "sparse float32": (1.9, 3.2),
            "sparse bfloat16": (1.05, 1.75),
        },
        60.0,
    ),
    "cpu, narrow": AttentionCosts(
        "typical",  # an AMD EPYC that computes AVX-512 in halves, see `kernels.rows.has_fast_onednn`, one thread
        {
            "native float32": (3.2, 6.1),
            "native bfloat16": (3.5, 6.5),
            "products bfloat16": (2.7, 4.15),
            "sparse float32": (4.4, 8.6),
            "sparse bfloat16": (3.1, 4.9),
        },
        40.0,
    ),
    "cuda": AttentionCosts(
        "typical",  # relative to a dense kernel at the peak of its rate; a block-sparse one reaches about 0.8 of it
        {
            f"{kernel} {dtype}": pair
            for kernel, pair in (("native", (1.0, 2.0)), ("sparse", (1.25, 2.5)))
            for dtype in ("float16", "bfloat16", "float32")
        },
        0.0,
        0.0,
    ),
}
"""Costs where none were measured."""


def attention_costs(device: torch.device | str = "cpu") -> AttentionCosts:
    """Return the costs that were measured on this machine, else typical ones.

    Args:
        device: where attention is computed.
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return TYPICAL["cuda"]
    return _kept(str(_path()), _machine()) or TYPICAL["cpu" if has_fast_onednn() else "cpu, narrow"]


def pays(query: Tensor, block_map: BlockMap, costs: AttentionCosts | None = None, *, online: bool = False) -> bool:
    """Return whether a block map is predicted to take less time than dense attention.

    Args:
        query: (B, N, K, E); only shape, dtype and device are read.
        block_map: the pairs.
        costs: None means `attention_costs`.
        online: the map is made anew for each call.
    """
    costs = costs or attention_costs(query.device)
    sparse = costs.sparse_seconds(query, block_map, online)
    dense = costs.dense_seconds(query, block_map.keys.grid.length)
    return sparse is None or dense is None or sparse < MARGIN * dense


def measure_attention_costs(repeats: int = 5) -> AttentionCosts:
    """Time attention on this CPU with one thread; a few seconds.

    Args:
        repeats: rounds; all kernels take turns.

    Returns:
        The costs; `save()` keeps them, and `attention_costs` finds them from then on.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return _measure(repeats)
    finally:
        torch.set_num_threads(before)


def _measure(repeats: int) -> AttentionCosts:
    from dit.attention.sparse import block_sparse_attention  # it asks for costs itself

    layout = raster_layout(TokenGrid(1, 32, TOKENS // 32), 128)
    shares = {"few": 2, "many": 6}  # blocks that each block visits
    maps = {name: make_block_map(layout, _first_blocks(layout.count, count)) for name, count in shares.items()}
    pairs = HEADS * TOKENS * TOKENS
    pair: dict[str, tuple[float, float]] = {}
    blocks = []
    for dtype in (torch.float32, torch.bfloat16):
        found: dict[str, list[float]] = {}
        for width in WIDTHS:
            query, key, value = (torch.randn(1, TOKENS, HEADS, width).to(dtype) for _ in range(3))
            calls: dict[str, Any] = {"native": lambda q=query, k=key, v=value: attend_native(q, k, v)}
            if products.has_fast_products(dtype):
                calls["products"] = lambda q=query, k=key, v=value: products.attend_all(q, k, v, q.shape[-1] ** -0.5)
            for name, block_map in maps.items():
                calls[name] = lambda q=query, k=key, v=value, m=block_map: block_sparse_attention(q, k, v, m)
            taken = {name: one.process_min for name, one in measure(calls, repeats).timings.items()}
            few, many = (shares[name] / layout.count * pairs for name in maps)
            slope = max((taken["many"] - taken["few"]) / (many - few), 0.1 * taken["native"] / pairs)  # despite noise
            blocks.append((taken["few"] - slope * few) / (HEADS * layout.count))
            rates = {name: taken[name] / pairs for name in calls if name not in shares} | {"sparse": slope}
            for name, seconds in rates.items():
                found.setdefault(name, []).append(seconds * 1e9)
        for name, (narrow, wide) in found.items():
            pair[f"{name} {str(dtype).removeprefix('torch.')}"] = (narrow, wide)
    return AttentionCosts(_machine(), pair, max(sum(blocks) / len(blocks), 0.0) * 1e6)


def _first_blocks(count: int, visited: int) -> Tensor:
    """Return a map in which each block visits as many others, (count, count)."""
    index = torch.arange(count)
    return (index[:, None] - index) % count < visited


@lru_cache(maxsize=1)
def _machine() -> str:
    """Name processor and torch; threads don't matter."""
    return ", ".join(part for part in machine_key("cpu").split(", ") if not part.endswith(" threads"))


def _path() -> Path:
    return _path_of(_machine(), os.environ.get("XDG_CACHE_HOME", ""))


@lru_cache(maxsize=4)
def _path_of(machine: str, cache: str) -> Path:
    """Return the file of a machine; `cache_path` reads the second argument itself."""
    digest = hashlib.sha256(machine.encode()).hexdigest()[:12]
    return cache_path("cpu").with_name(f"attention-costs-{digest}.json")


@lru_cache(maxsize=4)
def _kept(file: str, machine: str) -> AttentionCosts | None:
    """Return the costs in a file; None if there is none, or it is of another machine."""
    path = Path(file)
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content.get("machine") != machine:
        return None
    pair = {name: (float(low), float(high)) for name, (low, high) in content["pair"].items()}
    return AttentionCosts(machine, pair, float(content["block"]))
