"""Token positions: fixed sinusoidal tables over 1 to 3 axes, rotary embeddings over n axes, Fourier features."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Embed positions as `[sin | cos]` with `omega_i = 10000^(-i / (dim / 2))`.

    Args:
        positions: (N,), float.
        dim: even width.

    Returns:
        (N, dim), float64 (callers cast once, at the end).
    """
    omega = 10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double().reshape(-1, 1) * omega  # (N, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (N, dim)


def sincos_2d(height: int, width: int, dim: int, scale: float = 1.0) -> Tensor:
    """Return the fixed position table of DiT (arXiv 2212.09748): half the width for the column, half for the row.

    Args:
        height: token rows.
        width: token columns.
        dim: width of the table, a multiple of 4.
        scale: tokens a unit of position; larger for grids that are finer than those trained on.

    Returns:
        (height * width, dim), float32, in row-major order.
    """
    if dim % 4:
        raise ValueError(f"the position table's width must be a multiple of 4, got {dim}")
    # along each axis alone: a large grid has many more tokens than rows and columns
    columns = sincos_1d(torch.arange(width) / scale, dim // 2).expand(height, -1, -1)  # (H, W, dim/2)
    rows = sincos_1d(torch.arange(height) / scale, dim // 2)[:, None].expand(-1, width, -1)  # (H, W, dim/2)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()  # (H W, dim)


def sincos_3d(frames: int, height: int, width: int, dim: int, scale: float = 1.0) -> Tensor:
    """Return a fixed position table over (frame, row, column), a quarter of the width for the frame.

    Args:
        frames: frames T.
        height: token rows.
        width: token columns.
        dim: width of the table, a multiple of 16.
        scale: tokens a unit of position in rows and columns.

    Returns:
        (frames * height * width, dim), float32, in row-major order.
    """
    if dim % 16:
        raise ValueError(f"the position table's width must be a multiple of 16, got {dim}")
    space = sincos_2d(height, width, dim - dim // 4, scale).expand(frames, -1, -1)  # (T, H W, 3 dim/4)
    time = sincos_1d(torch.arange(frames), dim // 4).float()[:, None].expand(-1, height * width, -1)  # (T, H W, dim/4)
    return torch.cat([time, space], dim=-1).flatten(0, 1)  # (T H W, dim)


def grid_positions(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return integer positions of every token of an n-dimensional grid, row-major.

    Args:
        grid: tokens along each of A axes.
        device: where to put them.

    Returns:
        (N, A), float32.
    """
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(axes))  # (N, A)


def rotary_embedding(positions: Tensor, axes_dims: Sequence[int], theta: float = 10_000.0) -> Rotary:
    """Compute rotary embeddings over n axes (RoFormer, arXiv 2104.09864; each axis owns a slice of the head).

    Args:
        positions: (N, A), one column an axis.
        axes_dims: even widths, one an axis; their sum is the head width E.
        theta: base of the frequencies.

    Returns:
        (cos, sin), each (N, E), float32. Pairs are interleaved: channels 2i and 2i + 1 rotate together.
    """
    if positions.shape[-1] != len(axes_dims) or any(dim % 2 for dim in axes_dims):
        raise ValueError(f"{positions.shape[-1]} position axes need as many even widths, got {tuple(axes_dims)}")
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / max(dim, 1)
        angles.append(positions[:, axis : axis + 1].float() * theta**-exponent)  # (N, dim/2)
    full = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)  # (N, E)
    return full.cos(), full.sin()


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each pair of channels of `x` by its token's angles.

    Args:
        x: (B, N, K, E).
        rotary: (cos, sin), each (N, E), or (B, N, E) where the rows have different positions.

    Returns:
        (B, N, K, E), same dtype as `x`.
    """
    cos, sin = (part[..., None, :] for part in rotary)  # (N, 1, E) or (B, N, 1, E)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, K, E/2) each
    rotated = torch.stack([-odd, even], dim=-1).flatten(-2)  # (B, N, K, E)
    return (x.float() * cos + rotated * sin).to(x.dtype)


def fourier_positions(grid: Sequence[int], num_frequencies: int, device: torch.device | None = None) -> Tensor:
    """Compute Fourier features of each token's position as a fraction of the grid, the same at any resolution.

    Args:
        grid: tokens along each of A axes.
        num_frequencies: frequencies an axis; number k has 2^k half periods across the canvas.
        device: where to put them.

    Returns:
        (N, 2 * A * num_frequencies), float32.
    """
    sizes = torch.tensor(grid, dtype=torch.float32, device=device)
    fractions = (grid_positions(grid, device) + 0.5) / sizes  # (N, A) in (0, 1)
    octaves = math.pi * 2.0 ** torch.arange(num_frequencies, dtype=torch.float32, device=device)
    angles = (fractions[:, :, None] * octaves).flatten(1)  # (N, A F)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (N, 2 A F)
