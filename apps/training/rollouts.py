"""Rollouts of a next-scale generator: each caption several times, with the latents of every scale.

A search judges images of the first scales. How good these are shows in the finished images they lead to. Sampling
uses a temperature above the usual one, so that the images of a caption differ.
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

ALL_SCALES_TEMPERATURE = 1.5
"""Temperature if it is raised at all scales: with more, fine scales fall apart."""


@dataclass(frozen=True)
class RolloutPlan:
    """What is generated.

    Args:
        captions: P captions, at least one.
        settings: How each is sampled, arguments of the pipeline's call.
        candidates: Images C of each.
        seed: Seed of the samples.

    Raises:
        ValueError: If there are no captions, or not as many settings.
    """

    captions: tuple[str, ...]
    settings: tuple[dict[str, Any], ...]
    candidates: int
    seed: int

    def __post_init__(self) -> None:
        if not self.captions or len(self.captions) != len(self.settings):
            raise ValueError(
                f"{len(self.captions)} captions and {len(self.settings)} settings; give at least one, and as many"
            )

    def generators(self, number: int) -> list[torch.Generator]:
        """Return the random generators of a caption's images."""
        first = (self.seed << 20) + self.candidates * number  # torch reads 32 bits of a seed
        return [torch.Generator().manual_seed(first + one) for one in range(self.candidates)]


@dataclass(frozen=True)
class Rollouts:
    """Images of P captions, C of each, after each of S scales.

    Attributes:
        latents: After each scale, (P, C, S, c, h, w), float16.
        vectors: Image embeddings of the finished ones, (P, C, F), float32, unit length.
    """

    latents: Tensor
    vectors: Tensor


def coarse_scales(scales: int) -> int:
    """Return how many of the scales decide the layout: the first two thirds."""
    return scales - scales // 3


def hot_coarse_scales(scales: int, temperature: float, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of a call with a high temperature and no guidance at the coarse scales, the usual at the fine.

    Args:
        scales: Scales of the schedule.
        temperature: Of the coarse scales.
        defaults: The usual `guidance_scale` and `temperature`.
    """
    coarse = coarse_scales(scales)
    return {
        "guidance_scale": (1.0,) * coarse + (defaults["guidance_scale"],) * (scales - coarse),
        "temperature": (temperature,) * coarse + (defaults["temperature"],) * (scales - coarse),
        "top_p": 1.0,
    }


def hot_all_scales() -> dict[str, Any]:
    """Return arguments of a call with a high temperature and no guidance at all scales."""
    return {"guidance_scale": 1.0, "temperature": ALL_SCALES_TEMPERATURE, "top_p": 1.0}


@torch.no_grad()
def generate_rollouts(pipe: Any, plan: RolloutPlan, scorer: ClipReward, quiet: bool = False) -> Rollouts:
    """Generate images of captions and embed the finished ones.

    Args:
        pipe: `NextScaleTextToImagePipeline`.
        plan: What to generate.
        scorer: Embeds the finished images.
        quiet: Without a progress bar.
    """
    count = len(plan.captions)
    found: Any = None
    for number in track(range(count), "generating rollouts", console=Console(stderr=True), disable=quiet):
        prompts = [plan.captions[number]] * plan.candidates
        latents, images = _generate(pipe, prompts, plan.generators(number), plan.settings[number])
        vectors = scorer.look(images).cpu()  # (C, F)
        if found is None:  # in one piece: small tensors kept between large ones that go would break up the memory
            found = Rollouts(*(one.new_empty(count, *one.shape) for one in (latents, vectors)))
        found.latents[number], found.vectors[number] = latents, vectors
    return found


def _generate(
    pipe: Any, prompts: list[str], generators: list[torch.Generator], settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return latents after each scale, (C, S, c, h, w), and the images, (C, 3, H, W) in [0, 1]."""
    scales: list[Tensor] = []

    def keep(_pipe: Any, _scale: int, _at: Tensor, tensors: dict[str, Tensor]) -> None:
        scales.append(tensors["latents"].to("cpu", torch.float16))

    out = pipe(prompts, generator=generators, output_type="pt", callback_on_step_end=keep, **settings)
    return torch.stack(scales, dim=1), out.images.float()


def cached_rollouts(pipe: Any, plan: RolloutPlan, scorer: ClipReward, folder: Path) -> Rollouts:
    """Return rollouts, kept in a file of `folder` whose name is a hash of all that they depend on."""
    known = [model_fingerprint(part) for part in (pipe.transformer, pipe.vae, pipe.text_encoder, scorer.model)]
    path = folder / f"rollouts-{hashlib.sha256(repr((plan, known)).encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generated = generate_rollouts(pipe, plan, scorer)
        temporary = path.with_suffix(".tmp")
        save_file({"latents": generated.latents, "vectors": generated.vectors}, temporary)
        temporary.rename(path)
    return Rollouts(**load_file(path))
