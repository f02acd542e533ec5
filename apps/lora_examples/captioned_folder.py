"""Folders of images or clips with captions, in the form that trainers of LoRAs read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from apps.service.media import Clip, save_mp4


@dataclass(frozen=True)
class Captioned:
    """One image or clip to learn from.

    Attributes:
        stem: of the file's name.
        pixels: (3, H, W), or (T, 3, H, W) for a clip, in [-1, 1].
        captions: of it.
    """

    stem: str
    pixels: Tensor
    captions: tuple[str, ...]


def write_captioned(folder: Path, rows: Sequence[Captioned], fps: float = 8.0) -> list[Path]:
    """Write images as `STEM.png` and clips as `STEM.mp4`, each with its captions in `STEM.txt`, one a line.

    Args:
        folder: is made if it is missing; files of other names stay.
        rows: what to write.
        fps: frames a second of clips.

    Returns:
        The files of images and clips.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for row in rows:
        frames = to_images(row.pixels if row.pixels.ndim == 4 else row.pixels[None])
        if row.pixels.ndim == 4:
            file = save_mp4(Clip(tuple(frames), fps), folder / f"{row.stem}.mp4", None)
        else:
            file = folder / f"{row.stem}.png"
            frames[0].save(file)
        file.with_suffix(".txt").write_text("\n".join(row.captions) + "\n", encoding="utf-8")
        files.append(file)
    return files


def to_images(frames: Tensor) -> list[Image.Image]:
    """Return images of (T, 3, H, W) in [-1, 1]."""
    levels = ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)  # (T, 3, H, W)
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in levels]
