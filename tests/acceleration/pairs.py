"""Every acceleration and every pair of them on many models: does it run, tell the truth, and leave without a trace?

`python -m tests.acceleration.pairs` writes the table of docs/acceleration_models.md; `make test-all` compares each of
its rows with what happens.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from dit.quant.linear import QuantLinear
from dit.runtime.families import family_of
from dit.runtime.hooks import find_networks
from dit.runtime.state import unwrap
from pipelines import NextScaleClassToImagePipeline, load_pipeline
from pipelines.acceleration import AccelerationConfig, AccelerationError
from tests.families import every
from tests.families.tiny import BUILDERS
from tests.models import tiny_next_scale
from tests.pipes.test_next_scale_text import of_bits
from tests.runtime.truth import guided_call

FILE = Path(__file__).resolve().parents[2] / "docs" / "acceleration_models.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"

PARTS: dict[str, dict[str, Any]] = {
    "quantization": {"quantization": "int8:w8a8"},
    "attention backend": {"attention": "_native_math"},
    "sparse attention": {"attention": {"pattern": "pooled_topk", "params": {"block": 4}, "density": 0.5}},
    "step cache": {"step_cache": "easycache:threshold=9,warmup=1"},
    "guidance cache": {"guidance_cache": {"every": 2}},
    "decoder tiling": {"decoder_tiling": True},
    "KV cache": {"kv_cache": {"policy": "window", "budget": 0.5}},
    "scales": {"next_scale": {"skip_last": 1}},
    "compile": {"compile": {"backend": "eager"}},
}
"""Column of the table -> the acceleration. The quick backend of `compile` builds the same graphs as the usual one."""

BUILT_IN = ("stickers", "stickers-video", "stickers-var")
SCALES = ("next-scale class", "next-scale text")
MODELS = (*BUILT_IN, *SCALES, *(name for name in BUILDERS if name != every.FEW_STEP), *every.moving.BUILDERS)
STEPS = 4


def build(name: str) -> Any:
    """Return a pipeline that is as ever."""
    if name in BUILT_IN:
        pipe: Any = load_pipeline(name)
    elif name == "next-scale class":
        pipe = NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer())
    elif name == "next-scale text":
        pipe = of_bits()
    else:
        pipe = every.build(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str) -> Tensor:
    """Generate one image or clip, as far as the decoder."""
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(3), "output_type": "pt"}
    if name in SCALES:
        return pipe(["a cat"] if "text" in name else [1], **options).images
    if name in BUILT_IN:
        steps = {} if name == "stickers-var" else {"num_inference_steps": STEPS}
        made = pipe("a fox on blue", **options, **steps)
        return made.frames if name == "stickers-video" else made.images
    if name in BUILDERS:
        arguments = {**guided_call(pipe, name, guided=True), "num_inference_steps": STEPS, **options}
        if name == "dit":
            arguments["output_type"] = "np"
        return torch.as_tensor(pipe(**arguments)[0])
    size = {"height": every.side(name), "width": every.side(name), "num_frames": 9}
    arguments = {"prompt": every.caption(name), **size, **every.options(name), "num_inference_steps": STEPS}
    return torch.as_tensor(pipe(**arguments, **options)[0])


@dataclass
class Counters:
    """What is counted apart from all reports.

    Attributes:
        blocks: calls of the network's last block.
        tiles: calls of the decoder's own method for tiles.
    """

    blocks: int = 0
    tiles: int = 0


def _last_block(network: nn.Module) -> nn.Module:
    names = getattr(network, "_repeated_blocks", None) or ()
    found = [one for one in network.modules() if type(one).__name__ in names]
    return found[-1] if found else family_of(network).blocks(network, refiners=False)[-1][1]


@contextmanager
def counting(pipe: Any) -> Iterator[Counters]:
    """Count what a pipeline computes, below everything that an acceleration puts on it."""
    found = Counters()
    blocks = [_last_block(unwrap(network)) for network in find_networks(pipe).values()]

    def counted(inner: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            found.blocks += 1
            return inner(*args, **kwargs)

        return forward

    decode = getattr(type(getattr(pipe, "vae", None)), "tiled_decode", None)

    def tiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.tiles += 1
        return decode(self, *args, **kwargs)  # pyright: ignore[reportOptionalCall]

    for block in blocks:
        vars(block)["forward"] = counted(block.forward)
    if decode is not None:
        type(pipe.vae).tiled_decode = tiled
    try:
        yield found
    finally:
        for block in blocks:
            del vars(block)["forward"]
        if decode is not None:
            type(pipe.vae).tiled_decode = decode


def values_of(columns: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the acceleration of some columns; None if two of them are values of one part."""
    parts = [PARTS[column] for column in columns]
    names = [name for part in parts for name in part]
    return {name: value for part in parts for name, value in part.items()} if len(names) == len(set(names)) else None


def outcome(pipe: Any, name: str, columns: tuple[str, ...], plain: Tensor, plain_blocks: int) -> str:
    """Apply accelerations, generate, take them back.

    Args:
        pipe: nothing is on it.
        name: of the model.
        columns: keys of `PARTS`.
        plain: what the pipeline generates by itself.
        plain_blocks: calls of its last block meanwhile.

    Returns:
        "yes", or "no: " and the reason of a refusal.

    Raises:
        AssertionError: a report that isn't true, numbers that aren't finite, or an undo that isn't exact.
    """
    try:
        config = AccelerationConfig.from_dict(values_of(columns) or {})
        with counting(pipe) as counted:
            handle = config.apply(pipe)
            try:
                made = generate(pipe, name)
                report = {one.part: one for one in handle.report().parts}
                parts = [part for network in find_networks(pipe).values() for part in network.modules()]
                layers = sum(isinstance(one, QuantLinear) for one in parts)
            finally:
                handle.undo()
    except AccelerationError as error:
        return f"no: {error.key.removeprefix('refused.')}"
    where = f"{name}, {' + '.join(columns)}"
    assert made.isfinite().all(), where
    assert made.shape[0] == plain.shape[0], where
    _check_reports(report, counted, layers, plain_blocks, where)
    assert torch.equal(generate(pipe, name), plain), f"{where}: leaving was not exact"
    idle = [one for one in report.values() if not one.is_active]
    for one in idle:
        assert one.reasons, f"{where}: {one.part} did nothing and doesn't say why"
    return "idle: " + "; ".join(one.reasons[0].key.removeprefix("why.") for one in idle) if idle else "yes"


def _check_reports(report: dict[str, Any], counted: Counters, layers: int, plain_blocks: int, where: str) -> None:
    """Compare reports with counters that know nothing of them."""
    if "quantization" in report:
        assert report["quantization"].values["layers"] == layers > 0, where
    else:
        assert layers == 0, where
    if "decoder_tiling" in report:
        assert (report["decoder_tiling"].values["tiled"] > 0) == (counted.tiles > 0), where
    cached = report.get("step_cache")
    if cached is not None and "guidance_cache" not in report:
        share = counted.blocks / plain_blocks
        told = 1 - cached.values["skipped"] / max(cached.values["called"], 1)
        assert math.isclose(share, told, abs_tol=1e-6), f"{where}: {told} is told, {share} was computed"
    sparse = report.get("attention")
    if sparse is not None and sparse.key == "attention.plan" and sparse.is_active:
        assert 0 < sparse.values["density"] <= 1, where  # one block is all there is in the smallest grids


def row(name: str) -> dict[str, str]:
    """Return what happens with each acceleration and with all pairs of those that run, by column."""
    with patch("dit.quant.roles.LEAST_WIDTH", 8), patch("dit.quant.roles.MULTIPLE", 4):  # for tiny networks
        return _row(name)


def _row(name: str) -> dict[str, str]:
    torch.compiler.reset()
    pipe = build(name)
    with counting(pipe) as counted:
        plain = generate(pipe, name)
    found = {column: outcome(pipe, name, (column,), plain, counted.blocks) for column in PARTS}
    running = [column for column, told in found.items() if not told.startswith("no")]
    pairs = [pair for pair in itertools.combinations(running, 2) if values_of(pair) is not None]
    refused = []
    for pair in pairs:
        told = outcome(pipe, name, pair, plain, counted.blocks)
        if told.startswith("no"):
            refused.append(f"{' + '.join(pair)} ({told.removeprefix('no: ')})")
    found["pairs"] = f"{len(pairs) - len(refused)} of {len(pairs)}"
    if refused:
        found["pairs"] += f", without {'; '.join(refused)}"
    return found


def line(name: str) -> str:
    """Return a model's row as Markdown."""
    return f"| {name} | " + " | ".join(row(name).values()) + " |"


def main() -> None:
    """Put the table into the document."""
    torch.set_grad_enabled(False)
    head = ["model", *PARTS, "pairs that run"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in MODELS:
        lines.append(line(name))
        sys.stderr.write(lines[-1] + "\n")
    text = FILE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    FILE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
