"""`tessera bench quantization-gpu`: quantized layers and blocks on a GPU beside bfloat16.

Meant for one H200 and five minutes. Three tables:

- "checks": errors of each kernel against its definition;
- "linear layers": layers of DiT-XL and FLUX at 4,096 tokens and more, in float8, int8 and W4A8, the last as files of
  SVDQuant hold it (groups of 64, a branch of rank 32). Bars: 1.5, 1.4 and 1.3 times as fast as bfloat16;
- "blocks": one of DiT-XL (2 samples of 2,304 tokens) and two of FLUX (4,096 tokens and 512 of text), by `quantize_`.

Times are those of a CUDA graph, as compiled pipelines have them; "eager" beside it also launches from Python. All
weights are random, and balances and branches made up: errors are against the layer's own weights, in float32.

What can't run is listed with the reason. With --smoke it runs anywhere at tiny shapes, on a CPU by Triton's interpreter
in a process of its own, where its times say nothing.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.benchmarks.next_scale import Asked
from apps.benchmarks.on_gpu import Rows, fill_tables, find_device, run_in_interpreter
from apps.benchmarks.quantization import Block, make_block
from apps.environment import describe_machine
from dit.quant.activations import quantize_rows
from dit.quant.formats import grouped, weight_format
from dit.quant.formats.packing import int4_to_int8
from dit.quant.kernels import triton_int8
from dit.quant.kernels.contract import Use
from dit.quant.layer import quantize_linear
from dit.quant.linear import QuantLinear
from dit.quant.quantize import quantize_
from dit.quant.scheme import Scheme
from dit.runtime.metrics import relative_error
from dit.runtime.timing import measure

SECONDS = 270.0
"""After this long what is left isn't begun."""
CALLS = 10
"""Calls in a CUDA graph."""
LAYERS = (
    (4096, 1152, 4608), (4096, 4608, 1152), (4096, 1152, 3456), (16384, 1152, 4608),
    (4608, 3072, 12288), (4608, 12288, 3072), (4608, 3072, 9216), (4608, 3072, 3072),
)  # fmt: skip
"""Tokens M, inputs K and outputs N: four of DiT-XL, then four of FLUX, at 1024 pixels with text."""
SVDQUANT = Scheme("int4_group", 64, alpha=0.5, rank=32, raw_branch=True)
"""A layer of a file of SVDQuant, with activations of 8 bits."""
SCHEMES = {
    "float8": (Scheme("fp8", 0, "fp8"), 1.5),
    "int8": (Scheme("int8", 0), 1.4),
    "W4A8 of SVDQuant": (SVDQUANT, 1.3),
    "W4A8 g64": (Scheme("int4", 64), 1.3),
}
"""Schemes and bars: how many times as fast as bfloat16."""
BLOCKS = {"float8": ("fp8", "fp8"), "int8": ("int8", "w8a8"), "W4A8 g64": ("int8", "w4a8")}
"""Recipes and bits."""


@dataclass(frozen=True)
class Sizes:
    """How large the benchmark is.

    Args:
        device: where.
        dtype: of inputs.
        layers: M, K and N.
        repeats: counted rounds.
        is_small: whether blocks are tiny ones.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    layers: tuple[tuple[int, int, int], ...] = LAYERS
    repeats: int = 5
    is_small: bool = False


def bench_quantization_gpu(asked: Asked) -> dict[str, Any]:
    """Measure; on a CPU only with --smoke.

    Raises:
        UsageError: no triton, or no GPU.
    """
    device = find_device(asked, "quantization-gpu")
    if device.type != "cuda":
        return run_in_interpreter(__name__)
    return _run(_small(device) if asked.smoke else Sizes(device, repeats=min(asked.repeats, 5)))


def _small(device: torch.device) -> Sizes:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return Sizes(device, dtype, ((20, 64, 32),), 1, is_small=True)


def _run(sizes: Sizes) -> dict[str, Any]:
    """Fill the tables, until the time is over."""
    tables: dict[str, list[dict[str, Any]]] = {}
    parts: dict[str, Callable[[], Rows]] = {
        "checks": lambda: check_rows(sizes),
        "linear layers": lambda: layer_rows(sizes),
        "blocks": lambda: block_rows(sizes),
    }
    spent = fill_tables(tables, parts, SECONDS)
    return {"machine": describe_machine(sizes.device, sizes.dtype), **spent, "tables": tables}


# ---------------------------------------------------------------------------------------- checks


def check_rows(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield the errors of the kernels: against torch for codes and unpacked weights, against float64 for products."""
    from dit.quant.kernels.triton_product import finish_sums, multiply_int8
    from dit.quant.kernels.triton_rows import quantize_rows_by_triton, round_rows_to_float8

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 96, generator=generator)
    given = x.to(sizes.device, sizes.dtype)

    def row(what: str, found: Tensor, exact: Tensor, most: float) -> dict[str, Any]:
        error = relative_error(found.cpu().double(), exact.cpu().double())
        return {"kernel": what, "relative error": float(f"{error:.2g}"), "at most": most, "holds": error <= most}

    forms: dict[str, dict[str, Any]] = {
        "": {},
        ", shifted": {"shift": 0.17},
        ", static": {"scale": torch.tensor([0.02])},
    }
    for name, options in forms.items():
        moved = dict(options)
        if "scale" in moved:
            moved["scale"] = moved["scale"].to(sizes.device)
        codes = quantize_rows_by_triton(given, **moved).values
        yield row(f"rows to int8{name}", codes, quantize_rows(given.cpu(), **options).values, 2e-3)
    rounded, scale = round_rows_to_float8(given)
    yield row("rows to float8", rounded.float() * scale, given.float(), 0.04)
    a = torch.randint(-127, 128, (40, 96), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (48, 96), generator=generator, dtype=torch.int8)
    scales = [torch.rand(shape, generator=generator) + 0.5 for shape in ((40, 1), (48,), (48,))]
    exact = F.gelu(a.double() @ b.double().t() * 1e-4 * scales[1] * scales[0] + scales[2])
    a, b, *scales = (one.to(sizes.device) for one in (a, b, *scales))
    end: dict[str, Any] = {"bias": scales[2], "after": "gelu"}
    most = 5e-3 if sizes.dtype == torch.bfloat16 else 1e-6
    yield row("product", multiply_int8(a, b, scales[0], 1e-4 * scales[1], sizes.dtype, **end), exact, most)
    out = torch.empty(40, 48, dtype=sizes.dtype, device=sizes.device)
    finish_sums(a.int().float().matmul(b.t().float()).int(), scales[0], 1e-4 * scales[1], out, **end)
    yield row("end of a product", out, exact, most)
    yield from weight_rows(x, sizes, row)


def weight_rows(x: Tensor, sizes: Sizes, row: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the errors of kernels that make int8 weights of 4-bit ones."""
    from dit.quant.kernels.triton_product import regroup_int4, unpack_int4

    fmt, groups = weight_format("int4"), grouped(x, 64)
    found = fmt.scales(groups)
    tensors = fmt.pack(fmt.snap(groups, found), found, 96)
    packed = [tensors[name] for name in ("weight", "weight_multiplier", "weight_zero")]
    unpacked = int4_to_int8(packed[0], packed[1], packed[2], 64, 96)
    there = [one.to(sizes.device) for one in packed]
    yield row("int4 to int8", unpack_int4(there[0], there[1], there[2], 64, 96), unpacked, 0.0)
    fmt, groups = weight_format("int4_group"), grouped(x, 32)
    found = fmt.scales(groups)
    tensors = fmt.pack(fmt.snap(groups, found), found, 96)
    codes, scale = regroup_int4(tensors["weight"].to(sizes.device), tensors["weight_scale"].to(sizes.device), 96)
    yield row("groups of int4 to int8", codes * scale[:, None], fmt.unpack(tensors, 96, 32), 0.01)


# ----------------------------------------------------------------------------------------- layers


def layer_rows(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield times and errors of layers in each scheme, and of what they consist of."""
    for tokens, columns, rows in sizes.layers:
        torch.manual_seed(0)
        linear = nn.Linear(columns, rows, device=sizes.device)
        x = torch.randn(tokens, columns, device=sizes.device).to(sizes.dtype)
        plain = copy.deepcopy(linear).to(sizes.dtype)
        base = times_of(sizes, lambda plain=plain, x=x: plain(x))
        shape = f"{tokens} tokens, {columns} to {rows}"
        yield {"shape": shape, "layer": "bfloat16", **base}
        for name, (scheme, bar) in SCHEMES.items():
            layer = made_layer(linear, scheme)
            exact = x.float() @ layer.effective_weight().t() + linear.bias
            for part, (call, is_whole) in calls_of(sizes, name, layer, x).items():
                row = {"shape": shape, "layer": part, **gain_of(sizes, call, base["ms"])}
                if is_whole and "speed-up" in row:
                    row |= {"error": float(f"{relative_error(call().float(), exact):.2g}"), "bar": bar}
                    row["holds"] = row["speed-up"] >= bar
                yield row


def gain_of(sizes: Sizes, call: Callable[[], Any], base: float) -> dict[str, Any]:
    """Return the times of a call and how many times as fast it is; or why it can't run.

    Args:
        sizes: of the benchmark.
        call: what is timed.
        base: milliseconds of what it is compared with.
    """
    try:
        timed = times_of(sizes, call)
    except RuntimeError as error:
        return {"why not": str(error).strip().splitlines()[0]}
    return {**timed, "speed-up": round(base / timed["ms"], 2)}


def made_layer(linear: nn.Linear, scheme: Scheme) -> QuantLinear:
    """Quantize a layer to the nearest values; a balance of ones and a small branch are made up where it has any."""
    plain = replace(scheme, alpha=None, rank=0, raw_branch=False)
    made = quantize_linear(linear, plain)
    tensors, device = dict(made.tensors), linear.weight.device
    if scheme.alpha is not None:
        tensors["input_balance"] = torch.ones(linear.in_features, device=device)
    if scheme.rank:
        for name, shape in (
            ("low_rank_down", (scheme.rank, linear.in_features)),
            ("low_rank_up", (linear.out_features, scheme.rank)),
        ):
            tensors[name] = (0.01 * torch.randn(shape, device=device)).bfloat16()
    own = replace(made.scheme, alpha=scheme.alpha, rank=scheme.rank, raw_branch=scheme.raw_branch)
    return QuantLinear.from_tensors(own, tensors, linear.in_features, linear.out_features, made.bias)


def calls_of(sizes: Sizes, name: str, layer: QuantLinear, x: Tensor) -> dict[str, tuple[Callable[[], Tensor], bool]]:
    """Return what is timed of a layer: by name the call, and whether it computes all of the layer."""
    from dit.quant.kernels.triton_product import finish_sums, multiply_int8
    from dit.quant.kernels.triton_rows import quantize_rows_by_triton, round_rows_to_float8

    is_gpu = x.device.type == "cuda"
    found: dict[str, tuple[Callable[[], Tensor], bool]]
    if layer.scheme.weights == "fp8":
        found = {name: (partial(layer, x), True), f"{name}: rows alone": (lambda: round_rows_to_float8(x)[0], False)}
        if is_gpu:
            rounded, scale = round_rows_to_float8(x)
            weight, steps = layer.stored["weight"].t(), layer.stored["weight_scale"].reshape(1, -1)
            product = partial(torch._scaled_mm, rounded, weight, scale, steps, use_fast_accum=True)
            found[f"{name}: product alone"] = (partial(product, out_dtype=torch.bfloat16), False)
        return found
    if not is_gpu:  # the layer would take a kernel for CPUs
        weights, rank = layer._bundle(), layer.scheme.rank
        return {name: (lambda: triton_int8.multiply(weights, x, Use(samples=len(x))) + _branch(layer, x), not rank)}
    found = {name: (partial(layer, x), True)}
    if layer.scheme.weights == "int8":
        codes, scale = quantize_rows_by_triton(x)
        weight, steps = layer.stored["weight"], layer.stored["weight_scale"]
        found[f"{name}: rows alone"] = (lambda: quantize_rows_by_triton(x).values, False)
        product = partial(multiply_int8, codes, weight, scale, steps, x.dtype, bias=layer.bias.float())
        found[f"{name}: product alone"] = (product, False)

        def by_torch() -> Tensor:
            given = quantize_rows_by_triton(x)
            out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
            finish_sums(torch._int_mm(given.values, weight.t()), given.scale, steps, out, bias=layer.bias.float())
            return out

        found[f"{name} by _int_mm and its end"] = (by_torch, True)
    if layer.scheme.rank:
        down, up = layer.stored["low_rank_down"], layer.stored["low_rank_up"]
        weights = layer._bundle()

        def joined() -> Tensor:
            given = quantize_rows_by_triton(x * layer.stored["input_balance"].to(x.dtype))
            weight, steps = triton_int8._int8(weights)
            return multiply_int8(
                given.values, weight, given.scale, steps, x.dtype, bias=layer.bias.float(), branch=F.linear(x, down),
                up=up,
            )  # fmt: skip

        found[f"{name}, branch in the product"] = (joined, True)
    return found


def _branch(layer: QuantLinear, x: Tensor) -> Tensor | float:
    """Return what the low-rank branch adds, (M, N)."""
    if not layer.scheme.rank:
        return 0.0
    return x @ layer.stored["low_rank_down"].t().to(x.dtype) @ layer.stored["low_rank_up"].t().to(x.dtype)


# ----------------------------------------------------------------------------------------- blocks


def block_rows(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Yield times of whole blocks, and errors of their update."""
    for name, make in {"DiT-XL": dit_block, "FLUX": flux_block}.items():
        plain, before = make(sizes)
        base = times_of(sizes, plain.call)
        exact = plain.call().float()
        yield {"block": name, "layers": "bfloat16", **base}
        for kind, (recipe, bits) in BLOCKS.items():
            quick, _ = make(sizes)
            quantize_(quick.network, recipe, bits)
            row = {"block": name, "layers": kind, **gain_of(sizes, quick.call, base["ms"])}
            if "speed-up" in row:
                row["error"] = round(relative_error(quick.call().float() - before, exact - before), 4)
            yield row


@dataclass(frozen=True)
class Made:
    """A network of a block or two.

    Args:
        network: what is quantized.
        call: computes it.
    """

    network: nn.Module
    call: Callable[[], Tensor]


def dit_block(sizes: Sizes) -> tuple[Made, Tensor]:
    """Make a block of DiT-XL; and what its update is to."""
    network: Any = make_block(sizes.is_small)
    network = network.to(sizes.device, torch.bfloat16)
    width = network.config.num_attention_heads * network.config.attention_head_dim
    generator = torch.Generator(sizes.device).manual_seed(0)
    shape = 2, 16 if sizes.is_small else 2304, width
    x = torch.randn(shape, device=sizes.device, dtype=torch.bfloat16, generator=generator)
    block = Block(network).to(sizes.device)
    return Made(network, lambda: block(x)), x.float()


def flux_block(sizes: Sizes) -> tuple[Made, Tensor]:
    """Make a double and a single block of FLUX; and what the update of its images is to."""
    from diffusers import FluxTransformer2DModel

    heads, side, words = (2, 4, 8) if sizes.is_small else (24, 64, 512)
    torch.manual_seed(0)
    with torch.device(sizes.device):
        network = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, num_attention_heads=heads, guidance_embeds=False
        )
    network = network.bfloat16().eval()
    generator = torch.Generator(sizes.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=sizes.device, dtype=torch.bfloat16, generator=generator)

    x, text, condition = draw(1, side**2, 128 * heads), draw(1, words, 128 * heads), draw(1, 128 * heads)
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    turned = network.pos_embed(torch.cat([torch.zeros(words, 3), places]).to(sizes.device))
    double: Any = network.transformer_blocks[0]
    single: Any = network.single_transformer_blocks[0]

    def call() -> Tensor:
        given = {"temb": condition, "image_rotary_emb": turned}
        text_after, images = double(hidden_states=x, encoder_hidden_states=text, **given)
        return single(hidden_states=images, encoder_hidden_states=text_after, **given)[1]

    return Made(network, call), x.float()


# ------------------------------------------------------------------------------------------ times


def times_of(sizes: Sizes, call: Callable[[], Any]) -> dict[str, float]:
    """Return milliseconds of a call: in a CUDA graph, and launched from Python."""
    eager = measure({"run": call}, sizes.repeats, 1).timings["run"].wall_median
    if sizes.device.type != "cuda":
        return {"ms": round(1000 * eager, 3), "eager ms": round(1000 * eager, 3)}
    stream = torch.cuda.Stream(sizes.device)
    stream.wait_stream(torch.cuda.current_stream(sizes.device))
    with torch.cuda.stream(stream):  # kernels are tuned and memory is taken before the capture
        call()
    torch.cuda.current_stream(sizes.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    replayed = measure({"run": graph.replay}, sizes.repeats, 1).timings["run"].wall_median / CALLS
    return {"ms": round(1000 * replayed, 4), "eager ms": round(1000 * eager, 4)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(_small(torch.device("cpu")))) + "\n")
