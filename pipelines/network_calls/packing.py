"""Latents of an autoencoder in the form in which a pipeline denoises them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit.tokenizers import as_visual_tokenizer
from pipelines.base import TesseraPipeline
from pipelines.previews import unpack_latents


def normalize_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Bring an autoencoder's latents to the scale and the cells of a pipeline's loop.

    Args:
        pipe: a pipeline of ours or of diffusers.
        latents: of its autoencoder, (B, C, h, w) or (B, C, T, h, w).

    Returns:
        Normalised latents of the same shape; of FLUX.2, whose loop has a cell for 2 x 2 of them, (B, 4 C, h/2, w/2).
    """
    fold, norm = getattr(pipe, "_patchify_latents", None), getattr(pipe.vae, "bn", None)
    if fold is None or norm is None:
        return as_visual_tokenizer(pipe.vae).normalize_latents(latents)
    folded = fold(latents)  # (B, 4 C, h/2, w/2)
    mean = norm.running_mean.reshape(1, -1, 1, 1).to(folded)
    spread = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt().reshape(1, -1, 1, 1).to(folded)
    return (folded - mean) / spread


def pack_latents(
    pipe: Any, latents: Tensor, shape: Sequence[int], height: int, width: int, num_frames: int | None = None
) -> Tensor:
    """Bring latents into the form of a pipeline's loop; the inverse of `pipelines.previews.unpack_latents`.

    Unpacking only moves numbers about. Where it puts each is read off by having it unpack their positions.

    Args:
        pipe: a pipeline of ours or of diffusers.
        latents: of `normalize_latents`, (B, C, h, w) or (B, C, T, h, w).
        shape: of one sample in the loop, without the batch: a grid, a clip with any order of axes, or (N, C').
        height: of the image, pixels.
        width: of the image, pixels.
        num_frames: of the clip, if it is one.

    Returns:
        (B, *shape), the dtype of `latents`.

    Raises:
        ValueError: the latents don't fill that shape, or are unpacked to cells of another kind.
    """
    batch, count = len(latents), int(torch.tensor(tuple(shape)).prod())
    if isinstance(pipe, TesseraPipeline):
        if latents[0].numel() != count:
            raise _misfit(latents, shape)
        return latents.reshape(batch, *shape)
    positions = torch.arange(count, dtype=torch.float64).reshape(1, *shape)  # exact up to 2^53
    grid = unpack_latents(pipe, positions, height, width, num_frames)[0]  # (C, [T,] h, w)
    if grid.numel() != count or [one for one in grid.shape if one > 1] != [one for one in latents[0].shape if one > 1]:
        raise _misfit(latents, shape)
    places = grid.flatten().long()  # (C T h w,)
    packed = torch.empty(batch, count, dtype=latents.dtype, device=latents.device)
    packed[:, places.to(latents.device)] = latents.flatten(1)
    return packed.reshape(batch, *shape)


def _misfit(latents: Tensor, shape: Sequence[int]) -> ValueError:
    return ValueError(
        f"latents of shape {tuple(latents.shape[1:])} don't fill the pipeline's latents of shape {tuple(shape)}: "
        "use sizes that the pipeline generates, and its own autoencoder."
    )
