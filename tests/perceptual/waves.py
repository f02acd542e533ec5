"""Fixed images that need neither files nor a random generator."""

import torch
from torch import Tensor


def wave(height: int, width: int, turns: float) -> Tensor:
    """Draw an image (1, 3, H, W) in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    planes = [torch.sin(turns * (x + y)), torch.cos(turns * x * 2), torch.sin(turns * (y - x * x))]
    return torch.stack(planes)[None]
