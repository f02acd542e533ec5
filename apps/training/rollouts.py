"""Captions generated several times, hot enough to differ, with the image of every scale: where do coarse images lead?

What a search judges are images of the first scales; how right they are shows in what becomes of them.
"""

import hashlib
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
class RolloutPlan:
    """What is generated.

    Args:
        captions: P captions, at least one.
        ways: how each is drawn, arguments of the pipeline's call.
        candidates: images C of each.
        seed: of the draws.

    Raises:
        ValueError: no captions, or not a way for each.
    """

    captions: tuple[str, ...]
    ways: tuple[dict[str, Any], ...]
    candidates: int
    seed: int

    def __post_init__(self) -> None:
        if not self.captions or len(self.captions) != len(self.ways):
            raise ValueError(f"{len(self.captions)} captions and {len(self.ways)} ways; give at least one, and as many")

    def draws(self, number: int) -> list[torch.Generator]:
        """The sources of randomness of a caption's images."""
        first = (self.seed << 20) + self.candidates * number  # torch reads 32 bits of a seed
        return [torch.Generator().manual_seed(first + one) for one in range(self.candidates)]


@dataclass(frozen=True)
class Rollouts:
    """Images of P captions, C of each, on their way through S scales.

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
def paint_rollouts(pipe: Any, plan: RolloutPlan, scorer: ClipReward, quiet: bool = False) -> Rollouts:
    """Generates captions and looks at what became of them.

    Args:
        pipe: `NextScaleTextToImagePipeline`.
        plan: what to generate.
        scorer: looks at the finished images.
        quiet: without a progress bar.
    """
    count = len(plan.captions)
    found: Any = None
    for number in track(range(count), "painting rollouts", console=Console(stderr=True), disable=quiet):
        prompts = [plan.captions[number]] * plan.candidates
        latents, pictures = _paint(pipe, prompts, plan.draws(number), plan.ways[number])
        vectors = scorer.look(pictures).cpu()  # (C, F)
        if found is None:  # in one piece: small tensors kept between large ones that go would break up the memory
            found = Rollouts(*(one.new_empty(count, *one.shape) for one in (latents, vectors)))
        found.latents[number], found.vectors[number] = latents, vectors
    return found


def _paint(pipe: Any, prompts: list[str], draws: list[torch.Generator], way: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Latents after each scale, (C, S, c, h, w), and the images, (C, 3, H, W) in [0, 1]."""
    seen: list[Tensor] = []

    def keep(_pipe: Any, _scale: int, _at: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"].to("cpu", torch.float16))

    out = pipe(prompts, generator=draws, output_type="pt", callback_on_step_end=keep, **way)
    return torch.stack(seen, dim=1), out.images.float()


def cached_rollouts(pipe: Any, plan: RolloutPlan, scorer: ClipReward, folder: Path) -> Rollouts:
    """Rollouts, see `paint_rollouts`, kept in a file of `folder` whose name depends on all that they depend on."""
    known = [model_fingerprint(part) for part in (pipe.transformer, pipe.vae, pipe.text_encoder, scorer.model)]
    path = folder / f"rollouts-{hashlib.sha256(repr((plan, known)).encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        painted = paint_rollouts(pipe, plan, scorer)
        temporary = path.with_suffix(".tmp")
        save_file({"latents": painted.latents, "vectors": painted.vectors}, temporary)
        temporary.rename(path)
    return Rollouts(**load_file(path))
