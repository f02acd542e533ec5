"""`tessera bench attention-gpu`: the Triton kernel of sparse attention beside the best dense attention of a GPU.

Meant for one H200 and five minutes: 115,200 tokens (30 x 48 x 80), 24 heads of 128 in bfloat16. Four tables:

- "checks": errors of the kernel against the slow reference at 1,000 tokens, in all its forms;
- "dense": what torch offers there; the best is what all else is compared with;
- "sparse": time, speed-up, and share of ideal (speed-up times density) at several densities, and the time of bringing
  keys and values into the layout's order as a share of it;
- "eight bits": scores in int8 and values in float8 at a density of 0.16, and errors against dense attention, on inputs
  that vary slowly over the grid.

With --smoke it runs anywhere at tiny shapes, on a CPU by Triton's interpreter in a process of its own, where its times
say nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apps.benchmarks.next_scale import Asked
from apps.benchmarks.on_gpu import Rows, fill_tables, find_device, run_in_interpreter
from apps.environment import describe_machine
from dit.attention import BlockMap, TokenGrid, pattern
from dit.attention.block_map import TokenRule, make_block_map
from dit.attention.corrections.pooled import pooled_tail
from dit.attention.kernels import reference
from dit.attention.layout import Layout, raster_layout, tile_layout
from dit.runtime.metrics import relative_error
from dit.runtime.timing import measure

SECONDS = 270.0
"""After this long what is left isn't begun."""

DENSITIES = (0.09, 0.16, 0.25, 0.5, 1.0)
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Scale:
    """How large the benchmark is.

    Args:
        device: where.
        grid: (T, H, W).
        tile: (t, h, w) of a block.
        window: of the neighborhood pattern.
        stride: of it, so that no block is partial.
        heads: K.
        width: E.
        densities: of random maps.
        check: grid of the checks.
        repeats: counted rounds.
        dense: backends of torch that are tried.
    """

    device: torch.device
    grid: tuple[int, int, int] = (30, 48, 80)
    tile: tuple[int, int, int] = (2, 8, 8)
    window: tuple[int, int, int] = (18, 24, 24)
    stride: tuple[int, int, int] = (16, 8, 8)
    heads: int = 24
    width: int = 128
    densities: tuple[float, ...] = DENSITIES
    check: tuple[int, int, int] = (4, 15, 17)
    repeats: int = 5
    dense: tuple[str, ...] = ("cuDNN", "flash")

    @property
    def warmup(self) -> int:
        """Rounds that don't count."""
        return 1 if self.device.type == "cuda" else 0


def bench_attention_gpu(asked: Asked) -> dict[str, Any]:
    """Measure; on a CPU only with --smoke.

    Raises:
        UsageError: no triton, or no GPU.
    """
    device = find_device(asked, "attention-gpu")
    if device.type != "cuda":
        return run_in_interpreter(__name__)
    return _run(_small(device) if asked.smoke else Scale(device, repeats=min(asked.repeats, 5)))


def _small(device: torch.device) -> Scale:
    return Scale(
        device, (2, 4, 8), (1, 4, 4), (1, 4, 4), (1, 4, 4), 1, 16, (0.5,), (2, 3, 4), 1,
        ("cuDNN", "flash") if device.type == "cuda" else ("math",),
    )  # fmt: skip


def _run(scale: Scale) -> dict[str, Any]:
    """Fill the tables, until the time is over."""
    dtype = torch.bfloat16 if scale.device.type == "cuda" else torch.float32
    tables: dict[str, list[dict[str, Any]]] = {"checks": [], "dense": [], "sparse": [], "eight bits": []}
    parts: dict[str, Callable[[], Rows]] = {
        "checks": lambda: check_rows(scale),
        "dense": lambda: dense_rows(scale, dtype),
        "sparse": lambda: sparse_rows(scale, dtype, _best(tables["dense"])),
        "eight bits": lambda: eight_bit_rows(scale, dtype, _best(tables["dense"])),
    }
    spent = fill_tables(tables, parts, SECONDS)
    return {
        "machine": describe_machine(scale.device, dtype),
        "shape": {"tokens": scale.grid[0] * scale.grid[1] * scale.grid[2], "heads": scale.heads, "width": scale.width},
        **spent,
        "tables": {name: rows for name, rows in tables.items() if rows},
    }


def _best(dense: list[dict[str, Any]]) -> float:
    found = [row["ms"] for row in dense if row["ms"] is not None]
    if not found:
        reasons = "; ".join(f"{row['backend']}: {row['why not']}" for row in dense)
        raise RuntimeError(f"no dense attention runs here, so there is nothing to compare with ({reasons})")
    return min(found)


# ---------------------------------------------------------------------------------------- checks


class _Thirds(TokenRule):
    """Leaves out a third of the pairs."""

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether the sum of the indices isn't a multiple of 3."""
        return (query + key) % 3 > 0


def check_rows(scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield the errors of the kernel in its forms: ragged blocks, text, exact pairs, masked keys, a tail."""
    from dit.attention.kernels.triton import TritonOptions, attend

    grid = TokenGrid(*scale.check, 7, "last")
    generator = torch.Generator().manual_seed(0)
    forms = {
        "TMA": ("bfloat16", TritonOptions(use_tma=True)),
        "copies": ("bfloat16", TritonOptions(use_tma=False)),
        "pieces of 64": ("bfloat16", TritonOptions(block_n=64)),
        "float16": ("float16", TritonOptions()),
        "float32": ("float32", TritonOptions()),
        "int8": ("bfloat16", TritonOptions(int8_scores=True)),
        "int8 and float8": ("bfloat16", TritonOptions(int8_scores=True, fp8_values=True)),
    }
    layout = tile_layout(grid, scale.tile)
    for name, (dtype, options) in forms.items():
        visits = torch.rand(1, scale.heads, layout.visual_count, layout.visual_count, generator=generator) < 0.5
        block_map = make_block_map(layout, visits, rule=_Thirds()).to(scale.device)
        query, key, value = (
            torch.randn(1, grid.length, scale.heads, scale.width, generator=generator).to(
                scale.device, getattr(torch, dtype)
            )
            for _ in range(3)
        )
        mask = torch.rand(1, grid.length, generator=generator).to(scale.device) < 0.9
        tail = pooled_tail(key, value, block_map, mask)
        given = {"scale": scale.width**-0.5, "key_mask": mask, "tail": tail, "return_lse": True}
        out, lse = attend(query, key, value, block_map, **given, options=options)
        exact, exact_lse = reference.attend(query.double(), key.double(), value.double(), block_map, **given)
        largest = float("nan") if lse is None or exact_lse is None else float((lse - exact_lse).abs().max())
        yield {
            "form": name,
            "dtype": dtype,
            "relative error": round(relative_error(out.double(), exact), 6),
            "largest error of the LSE": float(f"{largest:.2g}"),
        }


# ----------------------------------------------------------------------------------------- times


def dense_rows(scale: Scale, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Yield the times of torch's dense attention; without one where it can't run."""
    query, key, value = (x.transpose(1, 2) for x in _inputs(scale, dtype))
    for name in scale.dense:
        try:
            with sdpa_kernel(BACKENDS[name]):
                milliseconds = _milliseconds(scale, lambda: F.scaled_dot_product_attention(query, key, value))
            yield {"backend": name, "ms": milliseconds, "why not": ""}
        except RuntimeError as error:
            yield {"backend": name, "ms": None, "why not": str(error).strip().splitlines()[0]}


def sparse_rows(scale: Scale, dtype: torch.dtype, best: float) -> Iterator[dict[str, Any]]:
    """Yield the times of random maps in raster order and tiles, and of a neighborhood, which needs no exact pairs."""
    from dit.attention.kernels.triton import TritonOptions, attend, pack_for

    grid = TokenGrid(*scale.grid)
    query, key, value = _inputs(scale, dtype)
    block = scale.tile[0] * scale.tile[1] * scale.tile[2]

    def row(name: str, block_map: BlockMap, options: TritonOptions) -> dict[str, Any]:
        block_map = block_map.to(scale.device)
        run = lambda: attend(query, key, value, block_map, scale=scale.width**-0.5, options=options)  # noqa: E731
        milliseconds, density = _milliseconds(scale, run), block_map.density()
        packed = _milliseconds(scale, lambda: pack_for(key, value, block_map, options=options))
        return {
            "map": name,
            "density": round(density, 4),
            "keys a piece": options.block_n,
            "ms": milliseconds,
            "speed-up": round(best / milliseconds, 2),
            "share of ideal": round(best / milliseconds * density, 3),
            "of that order (ms)": packed,
            "order's share": round(packed / milliseconds, 3),
        }

    window = pattern("neighborhood", grid, window=scale.window, stride=scale.stride, tile=scale.tile)
    for size in (128, 64) if block >= 128 else (32,):
        options = TritonOptions(block_n=size)
        yield row("neighborhood, tiles", window, options)
        for density in scale.densities:
            yield row("random, raster", random_map(raster_layout(grid, block), density, scale.heads), options)
    yield row(
        "random, tiles", random_map(tile_layout(grid, scale.tile), scale.densities[0], scale.heads),
        TritonOptions(block_n=128 if block >= 128 else 32),
    )  # fmt: skip


def eight_bit_rows(scale: Scale, dtype: torch.dtype, best: float, density: float = 0.16) -> Iterator[dict[str, Any]]:
    """Yield times and errors against dense attention of the best blocks with the pooled tail, in fewer bits."""
    from dit.attention.kernels.triton import TritonOptions, attend

    grid = TokenGrid(*scale.grid)
    query, key, value = slow_inputs(scale, dtype)
    with sdpa_kernel([BACKENDS[one] for one in scale.dense]):
        by_head = [x.transpose(1, 2) for x in (query, key, value)]
        dense = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2]).transpose(1, 2)
    block_map = pattern("pooled_topk", grid, query=query, key=key, keep=density, layout="tile", tile=scale.tile).to(
        scale.device
    )
    tail = pooled_tail(key, value, block_map)
    exact = None
    for bits, options in {
        f"{dtype}".removeprefix("torch."): TritonOptions(),
        "int8": TritonOptions(int8_scores=True),
        "int8 and float8": TritonOptions(int8_scores=True, fp8_values=True),
    }.items():
        run = lambda: attend(  # noqa: E731
            query,
            key,
            value,
            block_map,
            scale=scale.width**-0.5,
            tail=tail,
            options=options,  # noqa: B023
        )[0]
        out = run()
        exact = out if exact is None else exact
        milliseconds = _milliseconds(scale, run)
        yield {
            "numbers": bits,
            "density": round(block_map.density(), 4),
            "ms": milliseconds,
            "speed-up": round(best / milliseconds, 2),
            "error to dense": round(relative_error(out.float(), dense.float()), 4),
            "error to the first row": round(relative_error(out.float(), exact.float()), 4),
        }


def random_map(layout: Layout, density: float, heads: int) -> BlockMap:
    """Return a map of which each row of each head visits the same number of random blocks."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(1, heads, layout.count, layout.count, generator=generator).argsort(-1)
    return make_block_map(layout, chosen < max(round(density * layout.count), 1))


def slow_inputs(scale: Scale, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query, key and value that vary slowly over the grid, plus noise; queries look for keys like themselves."""
    generator = torch.Generator(scale.device).manual_seed(0)
    coarse = [max(side // 4, 1) + 1 for side in scale.grid]
    channels = scale.heads * scale.width

    def field() -> Tensor:
        low = torch.randn(1, channels, *coarse, generator=generator, device=scale.device)
        slow = F.interpolate(low, size=scale.grid, mode="trilinear", align_corners=True)[0]  # (K E, T, H, W)
        mixed = 0.8 * slow / slow.std() + 0.6 * torch.randn(slow.shape, generator=generator, device=scale.device)
        return mixed.view(scale.heads, scale.width, -1).permute(2, 0, 1)[None].to(dtype).contiguous()  # (1, N, K, E)

    query, key, value = field(), field(), field()
    return 2 * (query + key), key, value


def _inputs(scale: Scale, dtype: torch.dtype) -> list[Tensor]:
    """Draw query, key and value, (1, N, K, E)."""
    generator = torch.Generator(scale.device).manual_seed(0)
    shape = (1, scale.grid[0] * scale.grid[1] * scale.grid[2], scale.heads, scale.width)
    return [torch.randn(shape, generator=generator, device=scale.device, dtype=dtype) for _ in range(3)]


def _milliseconds(scale: Scale, run: Callable[[], object]) -> float:
    timing = measure({"run": run}, scale.repeats, scale.warmup).timings["run"]
    return round(1000 * timing.wall_median, 3)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(_small(torch.device("cpu")))) + "\n")
