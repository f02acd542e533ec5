"""Plans of other projects as `AttentionPlan`: Sliding Tile Attention's JSON, PAROAttention's and SpargeAttn's states.

They number steps; here noise levels are the keys, so a file needs the levels of the steps that it was made for. Nothing
of a pickle is run: states are tensors that the caller has read, e.g. with `torch.load(file, weights_only=True)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.attention.plan import DENSE, AttentionPlan, Choice, Guards, TensorName

PARO_ORDERS = ("thw", "twh", "hwt", "htw", "wht", "wth")
"""PAROAttention numbers the orders of the axes FHW, FWH, HWF, HFW, WHF, WFH."""

_STA_KEY = re.compile(r"(\d+)_(\d+)_(\d+)")


def flow_levels(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Return the noise levels of a flow-matching schedule, falling from 1.

    Args:
        steps: their number.
        shift: of the schedule: s becomes shift s / (1 + (shift - 1) s); HunyuanVideo has 7, Wan 3 to 8.
    """
    even = [1 - step / steps for step in range(steps)]
    return tuple(shift * level / (1 + (shift - 1) * level) for level in even)


def import_sta(
    source: str | PathLike[str] | Mapping[str, Sequence[int]],
    levels: Sequence[float],
    *,
    grid: tuple[int, int, int] | None = None,
    tile: tuple[int, int, int] = (6, 8, 8),
    guards: Guards | None = None,
) -> AttentionPlan:
    """Read a plan of Sliding Tile Attention (arXiv 2502.04507): "step_layer_head" -> window (t, h, w) in tiles.

    Args:
        source: the JSON file, or what it holds.
        levels: noise levels of its steps, see `flow_levels`.
        grid: tokens (T, H, W) that it was made for: windows that hold all tiles are dense then, and other grids are
            refused. None: for any grid.
        tile: tokens of a tile.
        guards: see `Guards`.

    Raises:
        ValueError: a key or window of another form, gaps, or another number of steps than levels.
    """
    data = source if isinstance(source, Mapping) else json.loads(Path(source).read_text())
    keys = {key: _STA_KEY.fullmatch(key) for key in data}
    odd = [key for key, match in keys.items() if match is None]
    if odd or not keys:
        raise ValueError(f"the key {odd[0]!r} is not step_layer_head" if odd else "the plan is empty")
    places = {key: tuple(int(number) for number in match.groups()) for key, match in keys.items() if match is not None}
    steps, layers, heads = (max(place[axis] for place in places.values()) + 1 for axis in range(3))
    if len(places) != steps * layers * heads:
        raise ValueError(
            f"{len(places)} entries for {steps} steps, {layers} layers and {heads} heads: some are missing"
        )
    counts = None if grid is None else [-(-size // side) for size, side in zip(grid, tile, strict=True)]
    choices: dict[Choice, int] = {}
    known: dict[tuple[int, ...], int] = {}
    table = torch.zeros(steps, layers, heads, dtype=torch.int16)
    for key, place in places.items():
        window = tuple(data[key])
        if window not in known:
            if len(window) != 3 or min(window) < 1:
                raise ValueError(f"the window {list(window)} of {key} is not (t, h, w) of at least 1")
            is_full = counts is not None and all(w >= n for w, n in zip(window, counts, strict=True))
            choice = DENSE if is_full else Choice("sliding_tile", {"window": window, "tile": tile})
            known[window] = choices.setdefault(choice, len(choices))
        table[place] = known[window]
    return _by_level(tuple(choices), table, levels, guards, grid)


def import_paro(
    masks: Tensor,
    orders: Tensor,
    grid: tuple[int, int, int],
    levels: Sequence[float],
    *,
    text_blocks: int = 0,
    block: int = 64,
    guards: Guards | None = None,
) -> AttentionPlan:
    """Read a plan of PAROAttention (arXiv 2506.16054): masks of blocks by bucket of steps, layer and head.

    Args:
        masks: `sparse_plan["sparse"]`, (buckets, layers, heads, n, n), not 0 where a block is visited.
        orders: `permute_plan["permute"]`, (layers, heads), numbers of `PARO_ORDERS`.
        grid: tokens (T, H, W).
        levels: noise levels of the steps, the noisiest first; step s of S belongs to bucket (s + 1) buckets // S.
        text_blocks: how many of the first blocks are of the text; they are exact here anyway.
        block: tokens of a block.
        guards: see `Guards`.

    Raises:
        ValueError: shapes that don't fit, or an unknown order.
    """
    buckets, layers, heads = masks.shape[:3] if masks.ndim == 5 else (0, 0, 0)
    whole, rest = divmod(grid[0] * grid[1] * grid[2], block)
    count = whole + bool(rest)
    blocks = masks.shape[-1] - text_blocks
    if not buckets or masks.shape[-2] != masks.shape[-1] or orders.shape != (layers, heads):
        raise ValueError(
            f"masks {tuple(masks.shape)} and orders {tuple(orders.shape)} don't fit; expected (buckets, layers, heads, "
            "n, n) and (layers, heads)"
        )
    if blocks not in (whole, count):
        raise ValueError(
            f"masks of {blocks} visual blocks don't fit {grid} tokens in blocks of {block}: expected {count}"
        )
    if int(orders.min()) < 0 or int(orders.max()) >= len(PARO_ORDERS):
        raise ValueError(f"orders up to {int(orders.max())} are not known: expected 0 to {len(PARO_ORDERS) - 1}")
    visual = masks[..., text_blocks:, text_blocks:] != 0
    # An incomplete last block has no mask of its own: the authors visit the last row and column always.
    visual = torch.nn.functional.pad(visual, (0, count - blocks, 0, count - blocks), value=True)
    visual[..., -1, :] = visual[..., -1] = True
    choices, tensors = [], {}
    for bucket in range(buckets):
        for layer in range(layers):
            name = f"masks.{bucket}.{layer}"
            tensors[name] = visual[bucket, layer].clone()
            axes = tuple(PARO_ORDERS[int(number)] for number in orders[layer])
            choices.append(Choice("paro", {"axes": axes, "masks": TensorName(name), "block": block}))
    table = torch.arange(buckets * layers).view(buckets, layers, 1).to(torch.int16)
    steps = len(levels)
    rows = [min((step + 1) * buckets // steps, buckets - 1) for step in range(steps)]
    return _by_level(tuple(choices), table[rows], levels, guards, grid, tensors)


def import_sparge(
    state: Mapping[str, Any],
    layers: Sequence[str],
    *,
    grid: tuple[int, int, int] | None = None,
    block: int = 128,
    key_block: int = 64,
    layout: str = "raster",
    guards: Guards | None = None,
) -> AttentionPlan:
    """Read thresholds of SpargeAttn (arXiv 2502.18137) that were tuned for each head.

    Its second stage, which skips products with values (`pvthreshd`), saves time within its kernel only and is left out.

    Args:
        state: names that end in "cdfthreshd", "simthreshd1" and "is_sparse" -> (heads,), as SpargeAttn saves them.
        layers: beginning of the names of each layer, in the order of execution.
        grid: tokens (T, H, W) that it was tuned for; None is any.
        block: queries of a block.
        key_block: keys of a block.
        layout: order of the tokens.
        guards: see `Guards`.

    Raises:
        ValueError: a layer without thresholds, or layers of unequal numbers of heads.
    """
    choices: dict[Choice, int] = {DENSE: 0}
    rows = []
    for layer in layers:
        found = {name: _sparge_tensor(state, layer, name) for name in ("cdfthreshd", "simthreshd1", "is_sparse")}
        row = []
        for mass, similarity, is_sparse in zip(*(one.tolist() for one in found.values()), strict=True):
            params = {"p": round(mass, 6), "similarity": round(similarity, 6), "block": block, "key_block": key_block}
            choice = Choice("pooled_topp", {**params, "layout": layout}) if is_sparse else DENSE
            row.append(choices.setdefault(choice, len(choices)))
        rows.append(row)
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"layers have {sorted({len(row) for row in rows})} heads: expected as many in each")
    table = torch.tensor(rows, dtype=torch.int16)[None]  # (1, layers, heads)
    return AttentionPlan(tuple(choices), table, guards=guards or Guards(), grid=grid)


def _sparge_tensor(state: Mapping[str, Any], layer: str, name: str) -> Tensor:
    keys = [key for key in state if key.startswith(f"{layer}.") and key.rpartition(".")[2] == name]
    if len(keys) != 1:
        raise ValueError(f"layer {layer!r} has {len(keys)} values {name!r}: expected one tensor (heads,)")
    return torch.as_tensor(state[keys[0]]).flatten()


def _by_level(
    choices: tuple[Choice, ...],
    table: Tensor,
    levels: Sequence[float],
    guards: Guards | None,
    grid: tuple[int, int, int] | None,
    tensors: Mapping[str, Tensor] | None = None,
) -> AttentionPlan:
    """Return the plan of a table by steps: bins end half-way between the noise levels of steps that differ."""
    if len(levels) != len(table) or any(later >= level for level, later in pairwise(levels)):
        raise ValueError(f"{len(levels)} levels for {len(table)} steps: expected one for each, falling")
    changes = [step for step in range(1, len(table)) if not torch.equal(table[step], table[step - 1])]
    bins = tuple((levels[step - 1] + levels[step]) / 2 for step in changes)
    return AttentionPlan(
        choices, table[[0, *changes]].contiguous(), bins, guards or Guards(), grid, tensors=tensors or {}
    )
