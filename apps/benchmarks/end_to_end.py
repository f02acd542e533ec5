"""`tessera bench generate`: how long an image takes at the default settings, and its parts.

A denoiser's parts are one forward pass and the decoder; those of a next-scale model all its scales, which differ in
size, and the decoder. Enlarging the image is no part of it: it is timed beside it.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from apps.benchmarks.next_scale import Asked
from apps.commands.loading import load_for_command
from apps.environment import describe_machine
from dit.runtime.timing import Comparison, count_flops, measure
from pipelines import builtin_upscalers, load_upscaler
from pipelines.info.inspection import info_of
from pipelines.next_scale.base import NextScalePipeline

PROMPT = "a red apple on a yellow background"
CLASS = 0

Work = Callable[[], object]


def bench_image(asked: Asked) -> dict[str, Any]:
    """Time an image at the pipeline's defaults, and its parts."""
    name = asked.model or "stickers"
    begun = time.perf_counter()
    pipe = load_for_command(name, asked.device, asked.dtype)
    loading = time.perf_counter() - begun
    parts = _scales if isinstance(pipe, NextScalePipeline) else _passes
    facts, works = parts(pipe)
    comparison = measure({**works, "upscaling by 4": _upscaling(pipe)}, asked.repeats)
    return {
        "model": name,
        "machine": describe_machine(torch.device(pipe.device), pipe.transformer.dtype),
        **facts,
        "seconds": {"loading": round(loading, 3), **medians(comparison)},
    }


def medians(comparison: Comparison) -> dict[str, float]:
    """Seconds of each candidate."""
    return {name: round(timing.wall_median, 4) for name, timing in comparison.timings.items()}


def _generate(pipe: Any, output_type: str = "pil") -> Any:
    """One image of a fixed seed, or its latents (1, C, h, w)."""
    asked = CLASS if "label" in info_of(pipe).arguments else PROMPT
    return pipe(asked, generator=torch.Generator().manual_seed(0), output_type=output_type).images


def _passes(pipe: Any) -> tuple[dict[str, Any], dict[str, Work]]:
    """Return what a denoiser does, and what to time of it."""
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append({"args": args, "kwargs": kwargs}), with_kwargs=True
    )
    latents = _generate(pipe, "latent")
    hook.remove()

    @torch.inference_mode()
    def step() -> None:
        pipe.transformer(*calls[0]["args"], **calls[0]["kwargs"])

    facts = {"steps": len(calls), "gflops_per_pass": round(count_flops(step) / 1e9, 3)}
    return facts, {"picture": lambda: _generate(pipe), "forward pass": step, "decoder": _decoding(pipe, latents)}


def _scales(pipe: NextScalePipeline) -> tuple[dict[str, Any], dict[str, Work]]:
    """Return what a next-scale model does, and what to time of it: all scales are one part."""
    latents = _generate(pipe, "latent")

    def scales() -> None:
        _generate(pipe, "latent")

    facts = {"scales": pipe.num_timesteps, "gflops_of_all_scales": round(count_flops(scales) / 1e9, 3)}
    return facts, {"picture": lambda: _generate(pipe), "all scales": scales, "decoder": _decoding(pipe, latents)}


def _upscaling(pipe: Any) -> Work:
    """Return the step that enlarges an image of the pipeline with the built-in upscaler."""
    upscaler, images = load_upscaler(builtin_upscalers()[0], device=pipe.device), _generate(pipe)

    def enlarge() -> None:
        upscaler(images, 4)

    return enlarge


def _decoding(pipe: Any, latents: torch.Tensor) -> Work:
    @torch.inference_mode()
    def decode() -> None:
        pipe.decode_latents(latents)

    return decode
