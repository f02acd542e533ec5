"""`tessera bench attention-corrections`: how near corrections bring sparse attention to dense attention, on toys.

Two tables of relative errors (L2 of the difference to dense attention over that of dense attention), on drawn tensors.
"left out" chooses the best blocks by their means and compares what stands for the others. "between steps" moves the
inputs by a fraction epsilon from the step at which the dense result was computed, as a sampler does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.benchmarks.next_scale import Asked
from apps.environment import describe_machine
from dit.attention import BlockMap, TokenGrid, attention_reference, block_sparse_attention
from dit.attention.block_map import make_block_map
from dit.attention.corrections import CorrectionCall, StateEntry, correction
from dit.attention.kernels.contract import Tail
from dit.attention.layout import Layout, raster_layout, tile_layout
from dit.attention.patterns.scores import block_means
from dit.runtime.metrics import relative_error
from dit.runtime.state import StateStore
from dit.runtime.step_context import StepContext, next_run

LEFT_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "pooled_tail": ("pooled_tail", {}),
    "pooled_tail, centroid": ("pooled_tail", {"mode": "centroid"}),
    "linear_complement": ("linear_complement", {}),
}
BETWEEN_STEPS = ("none", "pooled_tail", "residual", "ratio_residual")
EPSILONS = (0.02, 0.1, 0.3)
SHARPNESS = {"flat": (1.0, False), "peaky": (4.0, True)}
"""Toy -> deviation of the queries, and whether they look for keys like themselves."""


def bench_attention_corrections(asked: Asked) -> dict[str, Any]:
    """Measure the errors; they are the same on every machine but for rounding."""
    sides = (4, 8, 8) if asked.smoke else (8, 16, 16)
    grid = TokenGrid(*sides)
    layouts = {"tiles of 4 x 4 x 4": tile_layout(grid, (4, 4, 4)), "raster order": raster_layout(grid, 64)}
    left_out = [
        {"scores": kind, "blocks": name, **left_out_errors(kind, layout)}
        for kind in SHARPNESS
        for name, layout in layouts.items()
    ]
    between = [
        {"epsilon": epsilon, **between_steps_errors(epsilon, sides[0] * sides[1] * sides[2])} for epsilon in EPSILONS
    ]
    return {
        "machine": describe_machine(torch.device("cpu"), torch.float32),
        "tables": {"left out": left_out, "between steps": between},
    }


def left_out_errors(kind: str, layout: Layout, share: float = 0.15, heads: int = 4) -> dict[str, float]:
    """Return the density, and the error of each correction of `LEFT_OUT` where `share` of the blocks is visited."""
    query, key, value = smooth_inputs(kind, layout.grid, heads)
    dense = attention_reference(query, key, value)
    scores = block_means(query, layout)[0] @ block_means(key, layout)[0].mT  # (B, K, n, n)
    chosen = scores.topk(max(round(share * layout.count), 1), -1).indices
    block_map = make_block_map(layout, torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True))
    call = _call(query, key, value, block_map)
    errors = {
        name: round(relative_error(correction(one, **params)(call), dense), 3)
        for name, (one, params) in LEFT_OUT.items()
    }
    return {"density": round(block_map.density(), 3), **errors}


def between_steps_errors(epsilon: float, length: int = 2048, share: float = 0.34) -> dict[str, float]:
    """Return the error of each correction of `BETWEEN_STEPS` one step after its refresh, for random normal inputs.

    Args:
        epsilon: how far the inputs move, as a fraction of their deviation.
        length: tokens N.
        share: of the blocks that are visited, at random.
    """
    generator = torch.Generator().manual_seed(0)
    layout = raster_layout(TokenGrid(1, 1, length), 64)
    ranks = torch.rand(1, 1, layout.count, layout.count, generator=generator).argsort(-1)
    block_map = make_block_map(layout, ranks < round(share * layout.count))
    before = [torch.randn(1, length, 2, 64, generator=generator) for _ in range(3)]
    after = [x + epsilon * torch.randn(x.shape, generator=generator) for x in before]
    dense, run = attention_reference(after[0], after[1], after[2]), next_run()
    errors = {}
    for name in BETWEEN_STEPS:
        fix, state = correction(name), StateEntry(StateStore(), name, "0", "all")
        out = dense
        for step, (query, key, value) in enumerate((before, after)):
            context = StepContext(run, step, 50, 1 - step / 50, 1000.0)
            out = fix(_call(query, key, value, block_map, context, state))
        errors[name] = round(relative_error(out, dense), 3)
    return {"density": round(block_map.density(), 3), **errors}


def smooth_inputs(kind: str, grid: TokenGrid, heads: int = 4, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query, key and value (1, N, K, E) that vary slowly over the grid, as tokens of images do, plus noise.

    Args:
        kind: a key of `SHARPNESS`: how unequal the scores of a query are.
        grid: the tokens.
        heads: K.
        width: E.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = [max(side // 4, 1) + 1 for side in grid.shape]

    def field(noise: float) -> Tensor:
        low = torch.randn(1, heads * width, *coarse, generator=generator)
        slow = F.interpolate(low, size=grid.shape, mode="trilinear", align_corners=True)[0]  # (K E, T, H, W)
        mixed = (1 - noise**2) ** 0.5 * slow / slow.std() + noise * torch.randn(slow.shape, generator=generator)
        return mixed.view(heads, width, -1).permute(2, 0, 1)[None].contiguous()  # (1, N, K, E)

    deviation, alike = SHARPNESS[kind]
    query, key, value = field(0.6), field(0.6), field(0.6)
    mean = torch.randn(heads, width, generator=generator)  # what all values share
    return deviation * (0.5 * (query + key) if alike else query), key, value + mean


def _call(query: Tensor, key: Tensor, value: Tensor, block_map: BlockMap, *where: Any) -> CorrectionCall:
    """Return a call of a correction: dense attention, and sparse attention by the reference kernel."""

    def sparse(*, tail: Tail | None = None, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        out, lse = block_sparse_attention(query, key, value, block_map, kernel="reference", tail=tail, return_lse=True)
        return out, lse if return_lse else None

    def dense(*, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        out, lse = attention_reference(query, key, value, return_lse=True)
        return out, lse if return_lse else None

    return CorrectionCall(query, key, value, block_map, query.shape[-1] ** -0.5, sparse, dense, None, *where)
