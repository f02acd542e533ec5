"""The sticker world as training data: which scenes belong to which batch, and their images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from apps.stickers.renderer import render
from apps.stickers.scene import Scene, SceneMix, SceneSampler
from apps.stickers.sprites import SpriteSheet, load_sprites
from apps.stickers.vocabulary import STARTER
from apps.training.config import ConfigError

VALIDATION_SEED = 2**40  # series of the validation scenes: the same for every run, so that runs compare


def read_vocabulary(name: str) -> tuple[str, ...]:
    """The sticker names that `data.vocabulary` means.

    Args:
        name: `starter`, `all`, or the path of a text file with one name a line.

    Raises:
        ConfigError: If it is neither a known word nor a file, or names a sticker that does not exist.
    """
    sheet = load_sprites()
    if name == "starter":
        return STARTER
    if name == "all":
        return sheet.names
    if not Path(name).is_file():
        raise ConfigError(f"data.vocabulary = {name!r}: expected starter, all, or a text file with one name a line")
    names = tuple(line.strip() for line in Path(name).read_text().splitlines() if line.strip())
    try:
        for each in names:
            sheet.index(each)
    except KeyError as error:
        raise ConfigError(f"data.vocabulary = {name!r}: {error.args[0]}") from error
    return names


def scene_series(samplers: Sequence[tuple[SceneSampler, int]], seed: int, batch_index: int) -> list[Scene]:
    """The scenes of one batch: so many from each sampler, all at numbers that no other batch uses.

    Args:
        samplers: Samplers with the number of scenes to take from each.
        seed: Series.
        batch_index: Number of the batch, over all processes.
    """
    size = sum(count for _, count in samplers)
    numbers = iter(range(batch_index * size, (batch_index + 1) * size))
    return [sampler.scene(seed, next(numbers)) for sampler, count in samplers for _ in range(count)]


def box_mask(scenes: Sequence[Scene], resolution: int) -> Tensor:
    """Marks the pixels that lie in a sticker's box.

    Returns:
        Bool, (B, 1, resolution, resolution).
    """
    centre = (torch.arange(resolution) + 0.5) / resolution  # (R,)
    mask = torch.zeros(len(scenes), 1, resolution, resolution, dtype=torch.bool)
    for picture, scene in zip(mask, scenes, strict=True):
        for place in scene.placements:
            column = (centre - place.x).abs() <= place.size / 2  # (R,)
            row = (centre - place.y).abs() <= place.size / 2  # (R,)
            picture |= row[:, None] & column[None]
    return mask


def save_grid(pictures: Tensor, path: Path, columns: int) -> None:
    """Writes images (B, 3, H, W) in [-1, 1] as one PNG, row by row."""
    missing = -len(pictures) % columns
    pictures = torch.cat([pictures.float().cpu(), pictures.new_ones(missing, *pictures.shape[1:]).float().cpu()])
    rows = pictures.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (r H, c W, 3)
    Image.fromarray(((rows.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(path)


__all__ = [
    "VALIDATION_SEED",
    "Scene",
    "SceneMix",
    "SceneSampler",
    "SpriteSheet",
    "box_mask",
    "load_sprites",
    "read_vocabulary",
    "render",
    "save_grid",
    "scene_series",
]
