"""Scenes encoded ahead of training, so that a step costs no rendering and no encoding.

Latents are kept (in half precision) together with the scenes they show, so that every view gets a fresh caption.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apps.stickers import renderer
from apps.training.scenes import Scene, SceneMix, SceneSampler, SpriteSheet, render
from dit.tokenizers import as_visual_tokenizer

KINDS = ("single", "pair", "count")
Encode = Callable[..., Tensor]
"""From scenes (and the arguments of `encode_scenes`) to a tensor with a row for each."""


class LatentPool:
    """Scenes with their latents, to be drawn by kind and jitter.

    Args:
        scenes: P scenes.
        levels: Jitter that each scene was drawn with, (P,).
        latents: What the images are coded as, (P, ...), e.g. normalised latents (P, C, h, w).
    """

    def __init__(self, scenes: Sequence[Scene], levels: np.ndarray, latents: Tensor) -> None:
        self.scenes = scenes
        self.latents = latents
        self.members, self.levels = {}, {}
        for kind in KINDS:
            chosen = np.array([i for i, scene in enumerate(scenes) if scene.kind == kind], dtype=np.int64)
            chosen = chosen[np.argsort(levels[chosen], kind="stable")]  # calm scenes first
            self.members[kind], self.levels[kind] = chosen, levels[chosen]

    def draw(self, rng: np.random.Generator, size: int, weights: Sequence[float], jitter: float) -> np.ndarray:
        """Draws scene numbers.

        Args:
            rng: Source of the random numbers.
            size: How many.
            weights: Frequencies of single, pair and count.
            jitter: Largest jitter of the scenes drawn.

        Returns:
            (size,) indices into `scenes` and `latents`.

        Raises:
            ValueError: If the pool has no such scene of a kind with a positive weight.
        """
        kinds = rng.choice(len(KINDS), size, p=np.asarray(weights) / np.sum(weights))  # (size,)
        position = rng.random(size)  # (size,) in [0, 1)
        drawn = np.empty(size, dtype=np.int64)
        for number, kind in enumerate(KINDS):
            rows = kinds == number
            allowed = int(np.searchsorted(self.levels[kind], jitter, side="right"))
            if rows.any() and not allowed:
                raise ValueError(
                    f"the pool has no {kind} scene with jitter <= {jitter}; raise data.{kind} or pool_size"
                )
            drawn[rows] = self.members[kind][(position[rows] * allowed).astype(np.int64)]
        return drawn


def pool_scenes(
    sheet: SpriteSheet, vocabulary: Sequence[str], mix: SceneMix, jitters: Sequence[float], size: int, seed: int
) -> tuple[list[Scene], np.ndarray]:
    """Draws the scenes of a pool; the jitter levels take turns.

    Returns:
        The scenes, and the jitter of each, (size,).
    """
    shares = {"single": mix.single, "pair": mix.pair, "count": mix.count, "size_words": mix.size_words}
    samplers = [SceneSampler(sheet, vocabulary, mix=SceneMix(**shares, jitter=jitter)) for jitter in jitters]
    scenes = [samplers[index % len(jitters)].scene(seed, index) for index in range(size)]
    return scenes, np.array([jitters[index % len(jitters)] for index in range(size)])


@torch.no_grad()
def encode_scenes(
    scenes: Sequence[Scene],
    sheet: SpriteSheet,
    vae: nn.Module,
    resolution: int,
    device: torch.device,
    quiet: bool = True,
) -> Tensor:
    """Renders and encodes scenes.

    Returns:
        Normalised latents, (P, C, h, w), float16 on the CPU.
    """
    tokenizer = as_visual_tokenizer(vae)
    parts = []
    for start in track(range(0, len(scenes), 64), "encoding scenes", console=Console(stderr=True), disable=quiet):
        images = render(scenes[start : start + 64], sheet, resolution).to(device)  # (b, 3, H, W)
        latents = tokenizer.normalize_latents(tokenizer.encode(images, return_dict=False)[0])  # (b, C, h, w)
        parts.append(latents.to("cpu", torch.float16))
    return torch.cat(parts)


@torch.no_grad()
def encode_tokens(
    scenes: Sequence[Scene],
    sheet: SpriteSheet,
    vae: Any,
    resolution: int,
    device: torch.device,
    quiet: bool = True,
) -> Tensor:
    """Renders scenes and turns them into tokens of all scales in a row.

    Returns:
        Codebook entries (P, L), or bits (P, L, d); int16 on the CPU.
    """
    parts = []
    for start in track(range(0, len(scenes), 64), "encoding scenes", console=Console(stderr=True), disable=quiet):
        images = render(scenes[start : start + 64], sheet, resolution).to(device)  # (b, 3, H, W)
        parts.append(torch.cat(vae.quantize(images).indices, dim=1).to("cpu", torch.int16))  # (b, L) or (b, L, d)
    return torch.cat(parts)


def cached_latents(
    scenes: Sequence[Scene],
    sheet: SpriteSheet,
    vae: Any,
    resolution: int,
    device: torch.device,
    folder: Path,
    encode: Encode = encode_scenes,
) -> Tensor:
    """Encoded scenes, kept in a file whose name depends on all that the latents depend on.

    Args:
        scenes: P scenes.
        sheet: The stickers.
        vae: Autoencoder.
        resolution: Side of the images in pixels.
        device: Where to encode.
        folder: Folder of the cache files.
        encode: `encode_scenes` or `encode_tokens`.

    Returns:
        What `encode` returns.
    """
    digest = hashlib.sha256(repr((list(scenes), resolution, dict(vae.config))).encode())
    digest.update(inspect.getsource(renderer).encode())
    digest.update(sheet.pixels.numpy().tobytes())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    path = folder / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({"latents": encode(scenes, sheet, vae, resolution, device, quiet=False)}, temporary)
        temporary.rename(path)
    return load_file(path)["latents"]
