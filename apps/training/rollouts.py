"""Captions painted several times, hot enough to differ, with the picture of every scale: where do coarse pictures lead?

What a search judges are pictures of the first scales; how right they are shows in what becomes of them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit.runtime.artifacts import model_fingerprint
from sampling.rewards import ClipReward

HOT_EVERYWHERE = 1.5
"""Temperature where all scales are drawn hot: at more, fine scales are torn."""


@dataclass(frozen=True)
class Rollouts:
    """Pictures of P captions, C of each, on their way through S scales.

    Attributes:
        latents: after each scale, (P, C, S, c, h, w), float16.
        vectors: how a scorer sees the finished ones, (P, C, F), float32, unit length.
    """

    latents: Tensor
    vectors: Tensor


def coarse_scales(scales: int) -> int:
    """How many of the scales decide what stands where: the first two thirds."""
    return scales - scales // 3


def hot_way(scales: int, temperature: float, defaults: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call that draws the coarse scales unguided and hot, and the fine ones as usual.

    Args:
        scales: of the schedule.
        temperature: of the coarse scales.
        defaults: the usual `guidance_scale` and `temperature`.
    """
    coarse = coarse_scales(scales)
    return {
        "guidance_scale": (1.0,) * coarse + (defaults["guidance_scale"],) * (scales - coarse),
        "temperature": (temperature,) * coarse + (defaults["temperature"],) * (scales - coarse),
        "top_p": 1.0,
    }


def hot_everywhere() -> dict[str, Any]:
    """Arguments of a call that draws all scales unguided and hot."""
    return {"guidance_scale": 1.0, "temperature": HOT_EVERYWHERE, "top_p": 1.0}


@torch.no_grad()
def paint_rollouts(
    pipe: Any,
    captions: Sequence[str],
    ways: Sequence[dict[str, Any]],
    candidates: int,
    scorer: ClipReward,
    seed: int,
    quiet: bool = False,
) -> Rollouts:
    """Paints captions and looks at what became of them.

    Args:
        pipe: `NextScaleTextToImagePipeline`.
        captions: P captions.
        ways: how each is drawn, arguments of the pipeline's call.
        candidates: pictures of each caption.
        scorer: looks at the finished pictures.
        seed: of the draws.
        quiet: without a progress bar.
    """
    found: Rollouts | None = None
    for number, prompt in enumerate(track(captions, "painting rollouts", console=Console(stderr=True), disable=quiet)):
        first = (seed << 20) + candidates * number  # torch reads 32 bits of a seed
        draws = [torch.Generator().manual_seed(first + one) for one in range(candidates)]
        latents, pictures = _paint(pipe, [prompt] * candidates, draws, ways[number])
        vectors = scorer.look(pictures).cpu()  # (C, F)
        if found is None:  # in one piece: small tensors kept between large ones that go would break up the memory
            found = Rollouts(*(one.new_empty(len(captions), *one.shape) for one in (latents, vectors)))
        found.latents[number], found.vectors[number] = latents, vectors
    if found is None:
        raise ValueError("there are no captions to paint; give at least one")
    return found


def _paint(pipe: Any, prompts: list[str], draws: list[torch.Generator], way: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Latents after each scale, (C, S, c, h, w), and the pictures, (C, 3, H, W) in [0, 1]."""
    seen: list[Tensor] = []

    def keep(_pipe: Any, _scale: int, _at: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"].to("cpu", torch.float16))

    out = pipe(prompts, generator=draws, output_type="pt", callback_on_step_end=keep, **way)
    return torch.stack(seen, dim=1), out.images.float()


def cached_rollouts(
    pipe: Any,
    captions: Sequence[str],
    ways: Sequence[dict[str, Any]],
    candidates: int,
    scorer: ClipReward,
    seed: int,
    folder: Path,
) -> Rollouts:
    """Rollouts, kept in a file whose name depends on all that they depend on.

    Args:
        pipe: see `paint_rollouts`.
        captions: P captions.
        ways: see `paint_rollouts`.
        candidates: pictures of each caption.
        scorer: see `paint_rollouts`.
        seed: of the draws.
        folder: of the cache files.
    """
    known = [model_fingerprint(part) for part in (pipe.transformer, pipe.vae, pipe.text_encoder, scorer.model)]
    digest = hashlib.sha256(repr((list(captions), list(ways), candidates, seed, known)).encode())
    path = folder / f"rollouts-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        painted = paint_rollouts(pipe, captions, ways, candidates, scorer, seed)
        temporary = path.with_suffix(".tmp")
        save_file({"latents": painted.latents, "vectors": painted.vectors}, temporary)
        temporary.rename(path)
    return Rollouts(**load_file(path))
