"""Latents of an autoencoder in the form in which a pipeline denoises them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.base import TesseraPipeline
from pipelines.previews import unpack_latents


def pack_latents(
    pipe: Any, latents: Tensor, shape: Sequence[int], height: int, width: int, num_frames: int | None = None
) -> Tensor:
    """Bring latents into the form of a pipeline's loop; the inverse of `pipelines.previews.unpack_latents`.

    Unpacking only moves numbers about. Where it puts each is read off by having it unpack their positions.

    Args:
        pipe: a pipeline of ours or of diffusers.
        latents: normalised latents of the autoencoder, (B, C, h, w) or (B, C, T, h, w).
        shape: of one sample in the loop, without the batch: a grid, a clip with any order of axes, or (N, C').
        height: of the image, pixels.
        width: of the image, pixels.
        num_frames: of the clip, if it is one.

    Returns:
        (B, *shape), the dtype of `latents`.

    Raises:
        ValueError: the latents don't fill that shape.
    """
    batch, count = len(latents), int(torch.tensor(tuple(shape)).prod())
    if isinstance(pipe, TesseraPipeline):
        if latents[0].numel() != count:
            raise _misfit(latents, shape)
        return latents.reshape(batch, *shape)
    positions = torch.arange(count, dtype=torch.float64).reshape(1, *shape)  # exact up to 2^53
    places = unpack_latents(pipe, positions, height, width, num_frames).flatten().long()  # (C T h w,)
    if len(places) != latents[0].numel() or len(places) != count:
        raise _misfit(latents, shape)
    packed = torch.empty(batch, count, dtype=latents.dtype, device=latents.device)
    packed[:, places.to(latents.device)] = latents.flatten(1)
    return packed.reshape(batch, *shape)


def _misfit(latents: Tensor, shape: Sequence[int]) -> ValueError:
    return ValueError(
        f"latents of shape {tuple(latents.shape[1:])} don't fill the pipeline's latents of shape {tuple(shape)}: "
        "use sizes that the pipeline generates, and its own autoencoder."
    )
