"""`tessera bench quantization`: quantized layers and a block of DiT-XL on this CPU, beside torch and other libraries.

Ratios of times to torch's eager bfloat16: all candidates of a row take turns in one run. With one thread by processor
time, which other work on the machine disturbs least; with several by the clock. `--output` keeps the runs of several
days and gives ranges. Rivals run where they are installed, see `apps.benchmarks.quantization_rivals`; their knobs are
swept, and all settings are listed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from torch import Tensor, nn

from apps.benchmarks.attention import clock, least
from apps.benchmarks.next_scale import Asked
from apps.benchmarks.quantization_rivals import Call, rivals_of
from apps.benchmarks.synthetic_layer import SyntheticLayer
from apps.environment import describe_machine
from apps.service.usage import UsageError
from dit.attention.backend_scope import backend_scope
from dit.layers.linear import Linear
from dit.quant.layer import quantize_linear
from dit.quant.linear import QuantLinear
from dit.quant.quantize import quantize_
from dit.quant.recipes import layer_scheme, recipe
from dit.quant.roles import Role
from dit.quant.rotation import rotation_sign
from dit.quant.scheme import Scheme
from dit.runtime.metrics import relative_error
from dit.runtime.module_conversion import LinearSlot
from dit.runtime.timing import measure

WIDTH, HEADS, INNER = 1152, 16, 4608
"""Of DiT-XL."""
LAYERS = (
    (256, WIDTH, INNER), (1024, WIDTH, INNER), (4096, WIDTH, INNER), (1024, INNER, WIDTH), (1024, WIDTH, 3 * WIDTH),
    (1024, WIDTH, WIDTH),
)  # fmt: skip
"""Tokens M, inputs K and outputs N of linear layers."""
TOKENS = (256, 512, 1024)
"""Of a block; two samples, as guidance has them."""
SCHEMES = {
    "W8A8 plain": Scheme("int8", 0),
    "W8A8 balanced and rotated": Scheme("int8", 0, alpha=0.5, rotate=128),
    "W8A8 one scale a sample": Scheme("int8", 0, per_sample=True),
    "W8A8 static": Scheme("int8", 0, static=True),
    "W4A8 g64": Scheme("int4", 64),
    "W4A8 g64 balanced and rotated": Scheme("int4", 64, alpha=0.5, rotate=128),
    "W4A8 g64, rank 32": Scheme("int4", 64, alpha=0.5, rotate=128, rank=32),
}
"""Ours, of single layers."""
ERRORS = tuple(
    (name, bits) for bits in ("w8a8", "w4a8", "w4a6", "w4a4") for name in ("int8", "viditq", "svdquant")
    if bits in recipe(name).bits
)  # fmt: skip
"""Recipes and bits whose errors are measured."""
BLOCKS = {"W8A8 plain": ("int8", "w8a8"), "W8A8 viditq": ("viditq", "w8a8"), "W4A8 viditq": ("viditq", "w4a8")}
"""Recipes and bits, of whole blocks."""


def bench_quantization(asked: Asked) -> dict[str, Any]:
    """Measure all tables, or those whose names begin with what is asked for; a quarter of an hour with all rivals."""
    shapes = ((64, 128, 256),) if asked.smoke else LAYERS
    lengths = (64,) if asked.smoke else TOKENS
    ways: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "linear layers": lambda: [row for shape in shapes for row in layer_rows(*shape, asked)],
        "block of DiT-XL": lambda: [row for tokens in lengths for row in block_rows(tokens, asked)],
        "pipeline of DiT-XL's shape": lambda: pipeline_rows(asked),
        "size": lambda: size_rows(asked.smoke),
        "error with outliers": lambda: error_rows(asked),
    }
    chosen = [name for name in ways if not asked.names or name.startswith(tuple(asked.names))]
    if not chosen:
        raise UsageError(f"names are {', '.join(asked.names)}; use {', '.join(name.split()[0] for name in ways)}")
    with torch.no_grad():
        tables = {name: ways[name]() for name in chosen}
    machine = describe_machine(torch.device("cpu"), torch.bfloat16)
    return {"machine": {**machine, "clock": clock()}, "tables": tables}


# ------------------------------------------------------------------------------ layers


def layer_rows(tokens: int, columns: int, rows: int, asked: Asked) -> list[dict[str, Any]]:
    """Compare linear layers of one shape."""
    torch.manual_seed(0)
    layer, x = nn.Linear(columns, rows).eval(), torch.randn(tokens, columns)
    narrow, one_dnn = copy.deepcopy(layer).bfloat16(), Linear(columns, rows)
    one_dnn.load_state_dict(layer.state_dict())
    rounded = x.bfloat16()
    calls: dict[str, Call] = {
        "torch bfloat16": lambda: narrow(rounded),
        "torch float32 (MKL)": lambda: layer(x),
        "float32 (oneDNN)": lambda: one_dnn(x),
    }
    for name, scheme in SCHEMES.items():
        made = quantized_layer(layer, scheme, x)
        given = rounded[None] if scheme.per_sample else rounded
        calls[f"ours {name}"] = lambda made=made, given=given: made(given)
    calls |= rivals_of(layer, (x,), compiled=not asked.smoke)
    title = f"{tokens} tokens, {columns} to {rows}"
    return ratios(title, calls, layer(x), torch.zeros(()), asked.repeats)


def quantized_layer(layer: nn.Linear, scheme: Scheme, x: Tensor) -> QuantLinear:
    """Quantize a layer; balances and static scales are made up where the scheme asks for any: time is what counts."""
    found = quantize_linear(layer, replace(scheme, alpha=None, static=False))
    tensors = dict(found.tensors)
    if scheme.alpha is not None:
        tensors["input_balance"] = torch.ones(layer.in_features)
    if scheme.static:
        tensors["input_scale"] = (x.abs().amax() / 127).reshape(1)
    made = replace(found.scheme, alpha=scheme.alpha, static=scheme.static)
    if scheme.rotate and "rotation_sign" not in tensors:
        tensors["rotation_sign"] = rotation_sign(layer.in_features)
    return QuantLinear.from_tensors(made, tensors, layer.in_features, layer.out_features, layer.bias)


def ratios(title: str, calls: dict[str, Call], exact: Tensor, before: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Time candidates in turns.

    Args:
        title: of the rows.
        calls: by name; "torch bfloat16" is what they are compared with.
        exact: what they should return.
        before: what the update is to: errors are relative to `exact - before`.
        repeats: rounds.
    """
    errors = {
        name: relative_error(torch.as_tensor(call()).float().view(exact.shape) - before, exact - before)
        for name, call in calls.items()
    }
    times = measure(calls, repeats)
    base = least(times, "torch bfloat16")
    return [
        {
            "shape": f"{title}: {name}",
            "milliseconds": round(1e3 * least(times, name), 2),
            "gain": round(base / least(times, name), 2),
            "error": round(errors[name], 4),
        }
        for name in calls
    ]


# ------------------------------------------------------------------------------ blocks


class Block(nn.Module):
    """A block of DiT-XL with its condition fixed, so that other libraries can trace it.

    Args:
        network: with one block.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("timestep", torch.tensor([500, 500]))
        self.register_buffer("labels", torch.tensor([1, 1000]))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (2, N, D) to (2, N, D)."""
        block: Any = self.network.get_submodule("transformer_blocks.0")
        return block(hidden_states, timestep=self.timestep, class_labels=self.labels)


def make_block(smoke: bool = False) -> DiTTransformer2DModel:
    """Make a network with one block of random weights, drawn as DiT's are (arXiv 2212.09748), and gates of one."""
    torch.manual_seed(0)
    heads, width = (2, 64) if smoke else (HEADS, WIDTH // HEADS)
    made = DiTTransformer2DModel(heads, width, num_layers=1, sample_size=32, num_embeds_ada_norm=1000).eval()
    block: Any = made.transformer_blocks[0]
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear):
            # their projection to query, key and value is one matrix
            nn.init.xavier_uniform_(layer.weight, 0.5**0.5 if name.startswith("attn1.to_") and "out" not in name else 1)
            nn.init.zeros_(layer.bias)
    nn.init.normal_(block.norm1.linear.weight, std=0.02)
    with torch.no_grad():
        block.norm1.linear.bias.view(6, -1)[[2, 5]] = 1.0
    return made


def block_rows(tokens: int, asked: Asked) -> list[dict[str, Any]]:
    """Compare blocks."""
    plain = make_block(asked.smoke)
    exact = Block(plain)
    x = torch.randn(2, tokens, plain.config.num_attention_heads * plain.config.attention_head_dim)
    rounded = x.bfloat16()
    narrow = copy.deepcopy(exact).bfloat16()
    calls: dict[str, Call] = {"torch bfloat16": lambda: narrow(rounded), "torch float32": lambda: exact(x)}
    stack = ExitStack()  # what it undoes is gone with the networks
    name = "ours bfloat16, attention by products"
    calls[name] = _with_products(copy.deepcopy(plain).bfloat16(), rounded, stack)
    for name, (way, bits) in BLOCKS.items():
        network = copy.deepcopy(plain).bfloat16()
        quantize_(network, way, bits)
        calls[f"ours {name}"] = _with_products(network, rounded, stack)
    calls |= rivals_of(exact, (x,), compiled=not asked.smoke)
    return ratios(f"{tokens} tokens of 2 samples", calls, exact(x), x, asked.repeats)


def _with_products(network: nn.Module, x: Tensor, stack: ExitStack) -> Callable[[], Tensor]:
    """Return a call of a block whose attention goes through our kernels for CPUs."""
    stack.enter_context(backend_scope([network], "products"))
    block = Block(network)
    return lambda: block(x)


# --------------------------------------------------------------------------- pipelines


def make_pipeline(smoke: bool) -> DiTPipeline:
    """Make a pipeline of DiT-XL/2 and the autoencoder of Stable Diffusion, of random weights, in bfloat16."""
    torch.manual_seed(0)
    heads, width, depth, channels = (2, 64, 1, (32, 32)) if smoke else (HEADS, WIDTH // HEADS, 28, (128, 256, 512, 512))
    network = DiTTransformer2DModel(
        heads, width, in_channels=4, out_channels=8, num_layers=depth, sample_size=32, num_embeds_ada_norm=1000
    )
    kinds = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
    decoder = AutoencoderKL(
        down_block_types=kinds[0], up_block_types=kinds[1], block_out_channels=channels,
        layers_per_block=1 if smoke else 2, latent_channels=4, sample_size=256,
    )  # fmt: skip
    pipe = DiTPipeline(network.eval().bfloat16(), decoder.eval().bfloat16(), DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_rows(asked: Asked) -> list[dict[str, Any]]:
    """Time an image of 256 pixels with guidance, ten steps, decoded."""
    pipe = make_pipeline(asked.smoke)
    plain = pipe.transformer
    quick = copy.deepcopy(plain)
    quantize_(quick, "viditq", "w8a8")
    steps = 1 if asked.smoke else 10

    def generate(network: Any) -> Tensor:
        pipe.transformer = network
        seed = torch.Generator().manual_seed(0)
        image = pipe([1], num_inference_steps=steps, generator=seed, output_type="np").images
        return torch.from_numpy(image)

    stack = ExitStack()  # what it undoes is gone with the network
    stack.enter_context(backend_scope([quick], "products"))
    times = measure({"bfloat16": lambda: generate(plain), "ours": lambda: generate(quick)}, min(asked.repeats, 2))
    gain = least(times, "bfloat16") / least(times, "ours")
    return [{"shape": f"DiT-XL/2, 256 pixels, {steps} steps: ours W8A8 viditq", "gain": round(gain, 2)}]


# ------------------------------------------------------------------------------ errors


def error_rows(asked: Asked) -> list[dict[str, Any]]:
    """Return errors of a layer whose inputs have outliers that change with the noise level; the worst of both levels.

    The scheme is the recipe's own for a layer of DiT-XL whose input only it reads; inputs are new ones.
    """
    layer = SyntheticLayer.make(128 if asked.smoke else WIDTH)
    statistics = layer.statistics(256 if asked.smoke else 2048)
    role = Role(LinearSlot("layer", nn.Identity(), "layer", layer.linear), "other")
    rows = []
    for name, bits in ERRORS:
        found = recipe(name)
        scheme = layer_scheme(found, role, bits, calibrated=True)
        made = quantize_linear(layer.linear, scheme, statistics, aggregate=found.aggregate)
        rows.append({"recipe": name, "bits": bits, "error": round(max(layer.errors(made)), 4)})
    return rows


# ------------------------------------------------------------------------------- sizes


def size_rows(smoke: bool) -> list[dict[str, Any]]:
    """Return bytes of the weights of DiT-XL's blocks, quantized, beside bfloat16; scales and all count."""
    rows = []
    for name, bits in (("viditq", "w8a8"), ("viditq", "w4a8"), ("svdquant", "w4a8")):
        network = make_block(smoke).bfloat16()
        report = quantize_(network, name, bits)
        layers = [layer for layer in network.modules() if isinstance(layer, QuantLinear)]
        after = sum(layer.nbytes for layer in layers)
        before = sum(one.bytes_before for one in report.layers)
        rows.append({"format": f"{name} {bits}", "times smaller": round(before / after, 2)})
    return rows
