"""A batch of images as one PNG file."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (B, 3, H, W) in [-1, 1] as one PNG, row by row."""
    missing = -len(images) % columns
    images = torch.cat([images.float().cpu(), images.new_ones(missing, *images.shape[1:]).float().cpu()])
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (r H, c W, 3)
    Image.fromarray(((rows.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(path)
