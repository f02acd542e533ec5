"""Generated latents beside the images they should have been, for training a decoder to correct them.

A generator's latents differ from those of any image, and a decoder that has only seen encoded images shows each
difference as a fault. The target of a generated latent is the rendering that fits its image best
(`apps.stickers.fidelity`), so the decoder learns to turn what the generator makes into what it meant.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from apps.stickers.fidelity import measure_fidelity
from apps.stickers.scene import Placement, Scene
from apps.training.config import ConfigError
from apps.training.data.base import VALIDATION_SEED, TrainingData
from apps.training.data.stickers import StickerData
from dit.runtime.artifacts import model_fingerprint

CHUNK = 32  # images that are generated at once
MOST_STICKERS = 4  # of a scene
SAME_CODES = 0.01  # share of the energy of codes by which those of one encoder may differ
LEAST_FIDELITY = 16.0  # dB below which an image shows something else, and its best rendering is no target


@dataclass(frozen=True)
class GeneratedPairs:
    """P generated latents and the scenes of their targets.

    Attributes:
        latents: (P, C, h, w) float16, as the decoder takes them.
        placements: Sprite, x, y and size of each sticker, (P, 4, 4) float32; a sprite of -1 is none.
        backgrounds: (P,) int64.
        fidelity: PSNR of the generated image to its target in dB, (P,).
        data: Renders the targets.
    """

    latents: Tensor
    placements: Tensor
    backgrounds: Tensor
    fidelity: Tensor
    data: StickerData

    def __len__(self) -> int:
        return len(self.latents)

    def images(self, rows: Sequence[int]) -> Tensor:
        """Render targets, (B, 3, R, R) in [-1, 1]."""
        return self.data.render(self._scenes(rows))

    def tensors(self) -> dict[str, Tensor]:
        """Return all but the data."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _scenes(self, rows: Sequence[int]) -> list[Scene]:
        """Return scenes to render; only places and backgrounds of them mean anything."""
        found = []
        for row in rows:
            stickers = [one for one in self.placements[row].tolist() if one[0] >= 0]
            places = tuple(Placement(int(sprite), x, y, size) for sprite, x, y, size in stickers)
            found.append(Scene("single", places, int(self.backgrounds[row]), (places[0].sprite,)))
        return found


def load_generator(folder: Path, device: torch.device) -> Any:
    """Load the pipeline of a folder in float32, without progress bars.

    Raises:
        ConfigError: The folder holds none.
    """
    from pipelines import load_pipeline

    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"data.generated_from = {str(folder)!r} has no model_index.json; give the folder of a pipeline"
        )
    pipe: Any = load_pipeline(str(folder), device=device, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def check_encoder(pipe: Any, vae: Any, images: Tensor) -> None:
    """Refuse a generator that was trained on the codes of another encoder.

    Args:
        pipe: The generator with its own autoencoder.
        vae: The autoencoder whose decoder is trained.
        images: (B, 3, H, W) to compare the codes of.

    Raises:
        ConfigError: The codes differ by more than rounding of weights to half precision does.
    """
    was_training = vae.training
    vae.eval()
    own, other = vae.encode(images).latent.float(), pipe.vae.encode(images).latent.float()  # (B, C, h, w)
    vae.train(was_training)
    if own.shape != other.shape or (own - other).square().mean() > SAME_CODES * own.square().mean():
        raise ConfigError(
            "data.generated_from holds a pipeline that was trained on the codes of another encoder than that of "
            "data.init_from: give the pipeline that was trained on this autoencoder"
        )


@torch.no_grad()
def generate_pairs(pipe: Any, data: StickerData, count: int, seed: int, quiet: bool = False) -> GeneratedPairs:
    """Generate images of captions, and fit the renderings that they should have been.

    Args:
        pipe: Text-to-image pipeline, called with its own defaults.
        data: Draws scenes and captions.
        count: Images that are generated; those that show something else are left out.
        seed: Of scenes, captions and noise.
        quiet: Without a progress bar.

    Raises:
        ConfigError: All images show something else.
    """
    rng = np.random.default_rng((seed, VALIDATION_SEED))
    parts: list[dict[str, Tensor]] = []
    for start in track(range(0, count, CHUNK), "generating", console=Console(stderr=True), disable=quiet):
        numbers = range(start, min(start + CHUNK, count))
        scenes = [data.sampler.scene(VALIDATION_SEED + 3 + seed, number) for number in numbers]
        noise = [torch.Generator().manual_seed((seed << 24) + number) for number in numbers]
        captions = [data.caption(scene, rng) for scene in scenes]
        latents = pipe(captions, generator=noise, output_type="latent").images  # (b, C, h, w)
        images = pipe.vae.decode(latents).sample.float().clamp(-1, 1).cpu()  # (b, 3, H, W)
        found = measure_fidelity(images, scenes, data.sheet)
        parts.append(
            {
                "latents": latents.to("cpu", torch.float16),
                "placements": torch.stack([_table(scene) for scene in found.scenes]),
                "backgrounds": torch.tensor([scene.background for scene in found.scenes]),
                "fidelity": torch.tensor(found.psnr),
            }
        )
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    right = whole["fidelity"] >= LEAST_FIDELITY  # (P,)
    if not right.any():
        raise ConfigError(
            f"data.generated_from: none of {count} generated images is within {LEAST_FIDELITY:g} dB of what was asked "
            "for; give a pipeline that is trained"
        )
    return GeneratedPairs(**{name: one[right] for name, one in whole.items()}, data=data)


def cached_pairs(pipe: Any, data: TrainingData, count: int, seed: int, folder: Path) -> GeneratedPairs:
    """Return generated pairs, kept in a file of `folder` whose name is a hash of all that they depend on.

    Raises:
        TypeError: The data are not stickers, of which alone the best rendering is known.
        ConfigError: See `generate_pairs`.
    """
    if not isinstance(data, StickerData):
        raise TypeError(f"generated pairs need stickers, got {type(data).__name__}: set data.kind = 'stickers'")
    known = [model_fingerprint(part) for part in (pipe.transformer, pipe.vae, pipe.text_encoder)]
    depends = repr((known, dict(pipe.config.get("defaults") or {}), data.settings, data.resolution, count, seed))
    path = folder / f"pairs-{hashlib.sha256(depends.encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file(generate_pairs(pipe, data, count, seed).tensors(), temporary)
        temporary.rename(path)
    return GeneratedPairs(**load_file(path), data=data)


def _table(scene: Scene) -> Tensor:
    """Return the placements of a scene as rows, (4, 4)."""
    rows = torch.full((MOST_STICKERS, 4), -1.0)
    for row, place in zip(rows, scene.placements, strict=False):
        row[:] = torch.tensor([place.sprite, place.x, place.y, place.size])
    return rows
