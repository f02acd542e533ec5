"""`tessera bench attention`: dense and block-sparse attention on this CPU, beside torch's and what else is installed.

Ratios of times: all candidates of a row take turns in one run. With one thread by processor time, which other work on
the machine disturbs least; with several by the clock. `--output` keeps the runs of several days and gives ranges.
Rivals run where they are installed: OpenVINO (`openvino`), comfy-kitchen (`comfy_kitchen`), torch's flex attention
compiled (with a C++ compiler, and without `--smoke`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from apps.benchmarks.next_scale import Asked
from apps.environment import describe_machine
from dit.attention import BlockMap, TokenGrid, block_sparse_attention, pattern
from dit.attention.block_map import make_block_map
from dit.attention.corrections.pooled import pooled_tail
from dit.attention.kernels import products
from dit.attention.kernels.native import attend_native
from dit.attention.layout import axes_layout, raster_layout
from dit.runtime.metrics import relative_error
from dit.runtime.timing import Comparison, measure

HEADS = 4
BLOCK = 128
DENSE_SHAPES = ((256, 64), (512, 64), (1024, 64), (1024, 128), (4096, 64), (4096, 128))
"""Tokens and head width of dense attention."""
SPARSE_SHAPES = ((4096, 64), (4096, 128), (8192, 64), (16384, 64))
DENSITIES = (0.1, 0.2, 0.35, 0.5)
DTYPES = (torch.float32, torch.bfloat16)
ONLINE = {
    "pooled_topk": {"keep": 0.25},
    "pooled_topp": {"p": 0.9},
    "sol": {"tau": 1.0},
    "subblock": {"keep": 0.25},
    "draft": {"keep": 0.2},
    "antidiagonal": {"p": 0.9},
}
"""Predictors whose cost is measured."""


def bench_attention(asked: Asked) -> dict[str, Any]:
    """Measure all tables; about ten minutes with one thread, set by OMP_NUM_THREADS."""
    repeats = asked.repeats
    dense, sparse = (((256, 64),), ((512, 64),)) if asked.smoke else (DENSE_SHAPES, SPARSE_SHAPES)
    lengths = (512,) if asked.smoke else (4096, 16384)
    with torch.no_grad():
        tables = {
            "dense attention": [dense_row(*shape, dtype, repeats) for dtype in DTYPES for shape in dense],
            "sparse attention": [row for shape in sparse for row in sparse_rows(*shape, repeats)],
            "exact pairs": [exact_row(dtype, repeats, asked.smoke) for dtype in DTYPES],
            "choosing the pairs": [online_row(tokens, repeats) for tokens in lengths],
        }
        if not asked.smoke:
            tables["rivals"] = rival_rows(repeats)
    machine = describe_machine(torch.device("cpu"), torch.bfloat16)
    return {"machine": {**machine, "clock": clock(), "heads": HEADS}, "tables": tables}


def clock() -> str:
    """Return which time is compared: of the processor with one thread, by the clock with several."""
    return "process" if torch.get_num_threads() == 1 else "wall"


def least(comparison: Comparison, name: str) -> float:
    """Return the least time of a candidate, seconds."""
    timing = comparison.timings[name]
    return timing.process_min if clock() == "process" else timing.wall_min


def draw(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query, key and value, (1, N, K, E)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, tokens, HEADS, width, generator=generator).to(dtype) for _ in range(3))
    return query, key, value


def dense_row(tokens: int, width: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Compare dense attention by products with torch's, and with OpenVINO's where it is installed."""
    query, key, value = draw(tokens, width, dtype)
    calls: dict[str, Callable[[], object]] = {"torch": lambda: attend_native(query, key, value)}
    if products.has_fast_products(dtype):  # else nothing goes through them
        calls["products"] = lambda: products.attend_all(query, key, value, width**-0.5)
    other = openvino_attention(tokens, width) if dtype == torch.bfloat16 else None
    if other is not None:
        calls["openvino"] = lambda: other(query, key, value)
    times = measure(calls, max(repeats, 1) * (4 if tokens < 2048 else 1))
    exact = attend_native(query.double(), key.double(), value.double())
    errors = {name: relative_error(torch.as_tensor(call()).double(), exact) for name, call in calls.items()}
    row: dict[str, Any] = {
        "shape": f"N {tokens}, E {width}, {str(dtype)[6:]}",
        "torch ms": round(1e3 * least(times, "torch"), 2),
    }
    if "products" in calls:
        row["gain"] = round(least(times, "torch") / least(times, "products"), 2)
        row["error / torch's"] = round(errors["products"] / errors["torch"], 2)
    if other is not None:
        row["openvino: gain"] = round(least(times, "torch") / least(times, "openvino"), 2)
        row["openvino: error / torch's"] = round(errors["openvino"] / errors["torch"], 2)
    return row


def random_map(tokens: int, density: float, shared: bool) -> BlockMap:
    """Draw a map in which each block of queries visits as many blocks of keys."""
    layout = raster_layout(TokenGrid(1, tokens // 64, 64), BLOCK)
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, 1 if shared else HEADS, layout.count, layout.count, generator=generator)
    visited = scores.topk(max(round(density * layout.count), 1), dim=-1).indices
    return make_block_map(layout, torch.zeros_like(scores, dtype=torch.bool).scatter(-1, visited, True))


def sparse_rows(tokens: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """Compare maps of several densities with dense attention: share of the ideal gain, and of the best dense kernel."""
    rows = []
    for dtype in DTYPES:
        query, key, value = draw(tokens, width, dtype)
        maps = {density: random_map(tokens, density, False) for density in DENSITIES}
        calls: dict[str, Callable[[], object]] = {"torch": lambda q=query, k=key, v=value: attend_native(q, k, v)}
        if products.has_fast_products(dtype):
            calls["products"] = lambda q=query, k=key, v=value: products.attend_all(q, k, v, q.shape[-1] ** -0.5)
        for density, one in maps.items():
            calls[str(density)] = lambda q=query, k=key, v=value, m=one: block_sparse_attention(q, k, v, m)
        times = measure(calls, max(repeats // 2, 1))
        best = min(least(times, name) for name in calls if name in ("torch", "products"))
        for density, one in maps.items():
            taken, delivered = least(times, str(density)), one.density()
            rows.append(
                {
                    "shape": f"N {tokens}, E {width}, {str(dtype)[6:]}, density {density}",
                    "density": round(delivered, 3),
                    "of ideal": round(least(times, "torch") * delivered / taken, 2),
                    "gain": round(least(times, "torch") / taken, 2),
                    "beside the best dense": round(best / taken, 2),
                }
            )
    return rows


def exact_row(dtype: torch.dtype, repeats: int, smoke: bool) -> dict[str, Any]:
    """Measure a map whose blocks are cut by an exact rule: a window in raster order, which tiles would fit better."""
    side = 16 if smoke else 64
    window = side // 2 - 1
    block_map = pattern("neighborhood", TokenGrid(1, side, side), window=(1, window, window), tile=(1, 8, 16))
    query, key, value = draw(side * side, 64, dtype)
    times = measure(
        {
            "torch": lambda: attend_native(query, key, value),
            "sparse": lambda: block_sparse_attention(query, key, value, block_map),
        },
        repeats,
    )
    gain = least(times, "torch") / least(times, "sparse")
    return {
        "shape": f"N {side * side}, E 64, {str(dtype)[6:]}, window {window} x {window}",
        "density": round(block_map.density(), 3),
        "pairs": round(block_map.token_density(), 3),
        "of ideal": round(gain * block_map.density(), 2),
        "gain": round(gain, 2),
    }


def online_row(tokens: int, repeats: int) -> dict[str, Any]:
    """Measure what choosing blocks costs beside dense attention, E 64 in bfloat16: predictor, order, pooled tail."""
    grid = TokenGrid(1, tokens // 64, 64)
    query, key, value = draw(tokens, 64, torch.bfloat16)
    block_map = pattern("pooled_topk", grid, query=query, key=key, keep=0.25)
    layout = axes_layout(grid, "twh", BLOCK)
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: attend_native(query, key, value),
        "permutation": lambda: layout.restore(layout.permute(query.transpose(1, 2))),
        "pooled tail": lambda: pooled_tail(key, value, block_map),
    }
    for name, params in ONLINE.items():
        calls[name] = lambda n=name, p=params: pattern(n, grid, query=query, key=key, **p)
    times = measure(calls, repeats)
    whole = least(times, "torch")
    return {"shape": f"N {tokens}"} | {
        f"{name}, %": round(100 * least(times, name) / whole, 1) for name in calls if name != "torch"
    }


def rival_rows(repeats: int) -> list[dict[str, Any]]:
    """Compare the gather kernel with flex attention and comfy-kitchen's window attention where they run."""
    rows = []
    if shutil.which("c++") or shutil.which("g++"):
        for dtype in DTYPES:
            query, key, value = draw(4096, 64, dtype)
            one = random_map(4096, 0.35, True)
            calls: dict[str, Callable[[], object]] = {
                name: lambda n=name, q=query, k=key, v=value, m=one: block_sparse_attention(q, k, v, m, kernel=n)
                for name in ("flex_compiled", "gather")
            }
            times = measure(calls, max(repeats // 2, 1))
            rows.append(
                {
                    "shape": f"torch flex, compiled: N 4096, E 64, {str(dtype)[6:]}, density 0.35",
                    "gain": round(least(times, "flex_compiled") / least(times, "gather"), 2),
                }
            )
    if find_spec("comfy_kitchen") is not None:
        rows.append(kitchen_row(repeats))
    return rows


def kitchen_row(repeats: int) -> dict[str, Any]:
    """Compare Sol-Attn with comfy-kitchen's eager kernel, head width 128, in float32, which it computes in."""
    from importlib import import_module

    kitchen: Any = import_module("comfy_kitchen.backends.eager.sol_attn")
    grid = TokenGrid(1, 64, 64)
    query, key, value = draw(4096, 128, torch.bfloat16)
    by_head = [x.transpose(1, 2).contiguous() for x in (query, key, value)]

    def ours() -> Tensor:
        block_map = pattern("sol", grid, query=query, key=key, tau=1.0, layout="raster")
        return block_sparse_attention(query, key, value, block_map, tail=pooled_tail(key, value, block_map))

    times = measure({"kitchen": lambda: kitchen.sol_attn(*by_head), "ours": ours}, max(repeats // 2, 1))
    return {
        "shape": "comfy-kitchen sol_attn, eager: N 4096, E 128, bfloat16, tau 1",
        "gain": round(least(times, "kitchen") / least(times, "ours"), 2),
    }


def openvino_attention(tokens: int, width: int) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
    """Return OpenVINO's attention in bfloat16 on (B, N, K, E); None where it isn't installed."""
    if find_spec("openvino") is None:
        return None
    from importlib import import_module

    openvino: Any = import_module("openvino")
    ops: Any = import_module("openvino.opset13")
    shape = [1, HEADS, tokens, width]
    inputs = [ops.parameter(shape, openvino.Type.bf16) for _ in range(3)]
    result = ops.scaled_dot_product_attention(*inputs, causal=False)
    settings: Mapping[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(openvino.Model([result], inputs), "CPU", settings)
    request = compiled.create_infer_request()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tensors = [
            openvino.Tensor(x.transpose(1, 2).contiguous().view(torch.int16).numpy(), shape, openvino.Type.bf16)
            for x in (query, key, value)
        ]
        for index, tensor in enumerate(tensors):
            request.set_input_tensor(index, tensor)
        request.infer()
        out = torch.from_numpy(request.get_output_tensor(0).data.view("int16").copy()).view(torch.bfloat16)
        return out.view(shape).transpose(1, 2)

    return call
