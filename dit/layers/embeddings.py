"""Embeddings of timesteps, labels and patches, and patches back to pixels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.layers.linear import Linear


def sinusoidal_embedding(timestep: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed timesteps as `[cos, sin]` of geometrically falling frequencies.

    The exponent is `i / (dim / 2)`, as in the released DiT (arXiv 2212.09748); diffusers' DiT divides by `dim / 2 - 1`.

    Args:
        timestep: (B,), float.
        dim: width of the embedding, even.
        max_period: longest period.

    Returns:
        (B, dim), float32.
    """
    if dim % 2:
        raise ValueError(f"the embedding width must be even, got {dim}")
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None]  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


class TimestepEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep through a two-layer MLP.

    Args:
        hidden_size: width of the result.
        frequency_size: width of the sinusoidal embedding.
    """

    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.linear_1 = Linear(frequency_size, hidden_size)
        self.act = nn.SiLU()
        self.linear_2 = Linear(hidden_size, hidden_size)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed `timestep` (B,) as (B, D) in `dtype`."""
        sinusoidal = sinusoidal_embedding(timestep, self.frequency_size).to(dtype)  # (B, F)
        return self.linear_2(self.act(self.linear_1(sinusoidal)))  # (B, D)


class LabelEmbedding(nn.Module):
    """A table of class vectors; its last row stands for 'no class' where labels are dropped in training.

    Args:
        num_classes: labels 0 ... num_classes - 1.
        hidden_size: model width D.
        dropout_prob: fraction of labels replaced by 'no class' in training mode; 0 leaves the extra row out.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """Map labels (B,) to vectors (B, D)."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob  # (B,)
            labels = labels.masked_fill(dropped, self.num_classes)  # (B,)
        return self.table(labels)  # (B, D)


class TextProjection(nn.Module):
    """Two linear layers from a text encoder's width to the model's (PixArt-alpha, arXiv 2310.00426).

    Args:
        text_dim: width Dt of the text states.
        hidden_size: model width D.
    """

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = Linear(text_dim, hidden_size)
        self.linear_2 = Linear(hidden_size, hidden_size)

    def forward(self, text: Tensor) -> Tensor:
        """Map (B, L, Dt) to (B, L, D)."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))  # (B, L, D)


def patchify(x: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cut a latent video into patches, row by row.

    Args:
        x: (B, C, T, H, W).
        patch_size: (pT, pH, pW); each must divide its axis.

    Returns:
        (B, N, pT * pH * pW * C) with N = (T/pT)(H/pH)(W/pW).
    """
    b, c, t, h, w = x.shape
    pt, ph, pw = patch_size
    if t % pt or h % ph or w % pw:
        raise ValueError(
            f"a latent of (T, H, W) = {(t, h, w)} can't be cut into patches of {patch_size}; "
            f"use multiples of {pt}, {ph} and {pw}"
        )
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, T', H', W', pT, pH, pW, C)
    return x.reshape(b, (t // pt) * (h // ph) * (w // pw), pt * ph * pw * c)  # (B, N, P)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch_size: tuple[int, int, int]) -> Tensor:
    """Undo `patchify`.

    Args:
        tokens: (B, N, pT * pH * pW * C).
        grid: tokens along (T, H, W), with product N.
        patch_size: (pT, pH, pW).

    Returns:
        (B, C, T, H, W).
    """
    b = tokens.shape[0]
    (t, h, w), (pt, ph, pw) = grid, patch_size
    x = tokens.reshape(b, t, h, w, pt, ph, pw, -1)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, T', pT, H', pH, W', pW)
    return x.reshape(b, -1, t * pt, h * ph, w * pw)  # (B, C, T, H, W)
