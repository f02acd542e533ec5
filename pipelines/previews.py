"""Previews of unfinished latents for every pipeline, at a fraction of the time of a denoising step.

diffusers' pipelines hand their latents to step callbacks in several forms: as a grid, as a clip with the channels after
or before the frames or last, or packed into a sequence of tokens. All become a grid here, which a linear map
turns into colours. Our own tokenizers decode small latents instead, see `VisualTokenizer.preview`.
"""

from __future__ import annotations

import inspect
import math

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from dit.tokenizers import as_visual_tokenizer
from pipelines.base import TesseraPipeline
from sampling import diffusion_targets


def can_preview(pipe: DiffusionPipeline) -> bool:
    """Return whether `preview` knows how to show the latents of a pipeline."""
    if isinstance(pipe, TesseraPipeline):
        return pipe.vae is not None
    if not isinstance(getattr(pipe, "vae", None), torch.nn.Module):
        return False
    try:
        as_visual_tokenizer(pipe.vae)
    except ValueError:  # an autoencoder that says nothing about its latents
        return False
    return True


@torch.no_grad()
def preview(
    pipe: DiffusionPipeline, latents: Tensor, height: int, width: int, num_frames: int | None = None
) -> list[Image.Image]:
    """Show latents as a step callback gets them; of a clip the first frame.

    Works whatever offloading moves about: nothing but the autoencoder's configuration is needed for pipelines of
    diffusers, and ours bring what they need over by themselves.

    Args:
        pipe: a pipeline of ours or of diffusers that `can_preview`.
        latents: (B, C, H, W), (B, C, T, H, W), (B, T, C, H, W), (B, T, H, W, C) or packed (B, N, C'), any float dtype.
        height: of the image, pixels.
        width: of the image, pixels.
        num_frames: of the clip, if it is one.

    Returns:
        B small images.

    Raises:
        ValueError: latents of another rank.
    """
    if isinstance(pipe, TesseraPipeline):
        return pipe.preview(latents)
    grid = unpack_latents(pipe, latents.to("cpu", torch.float32), height, width, num_frames)
    rgb = as_visual_tokenizer(pipe.vae).preview(grid)  # (B, 3, h, w)
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy((rgb + 1) / 2))


def unpack_latents(
    pipe: DiffusionPipeline, latents: Tensor, height: int, width: int, num_frames: int | None = None
) -> Tensor:
    """Bring a pipeline's latents into the form of a grid.

    Args:
        pipe: a pipeline of diffusers.
        latents: as its step callback gets them.
        height: of the image, pixels.
        width: of the image, pixels.
        num_frames: of the clip, if it is one.

    Returns:
        (B, C, H, W) or (B, C, T, H, W).

    Raises:
        ValueError: latents of another rank than 3, 4 or 5.
    """
    if latents.ndim == 4:
        return latents
    tokenizer = as_visual_tokenizer(pipe.vae)
    channels, across = tokenizer.latent_channels, tokenizer.spatial_compression_ratio
    if latents.ndim == 5:
        cells = (height // across, width // across)
        if latents.shape[2:4] == cells != latents.shape[3:]:  # Kandinsky's, behind which a condition may follow
            return latents.movedim(4, 1)[:, :channels]  # (B, C, T, H, W)
        frames_first = latents.shape[1] != channels and latents.shape[2] == channels
        return latents.transpose(1, 2) if frames_first else latents  # (B, C, T, H, W)
    if latents.ndim != 3:
        raise ValueError(f"latents of shape {tuple(latents.shape)} can't be shown: expected 3, 4 or 5 dimensions.")
    unpack = getattr(pipe, "_unpack_latents", None)  # not in diffusers' documentation, but in all that pack
    arguments = None if unpack is None else _arguments_of(unpack, pipe, height, width, num_frames)
    if unpack is None or arguments is None:
        along = as_visual_tokenizer(pipe.vae).temporal_compression_ratio
        layers = ((num_frames or 1) - 1) // along + 1  # of a clip, one behind the other: the first is shown
        return fold_tokens(latents[:, : latents.shape[1] // layers], height, width)
    return unpack(latents, **arguments)


def fold_tokens(latents: Tensor, height: int, width: int) -> Tensor:
    """Fold the tokens of an image into a grid of its shape; each token becomes one cell.

    Args:
        latents: (B, N, C').
        height: of the image, pixels.
        width: of the image, pixels.

    Returns:
        (B, C', H', W').

    Raises:
        ValueError: N tokens don't fill such a grid.
    """
    count = latents.shape[1]
    rows = max(round(math.sqrt(count * height / width)), 1)
    if count % rows:
        raise ValueError(f"{count} tokens don't fill a grid of the shape of {width} x {height} pixels.")
    return latents.transpose(1, 2).unflatten(2, (rows, count // rows))  # (B, C', H', W')


def is_flow(pipe: DiffusionPipeline) -> bool:
    """Return whether the pipeline's scheduler is one of a flow."""
    return diffusion_targets.is_flow(pipe.scheduler)


def predict_x0(pipe: DiffusionPipeline, before: Tensor, latents: Tensor) -> Tensor:
    """Predict a flow's clean latents from those of two steps, by extrapolating the (nearly) straight path.

    With x = (1 - sigma) * data + sigma * noise, data = x - sigma * dx / dsigma. Noisy latents show nothing until late;
    the guess shows the layout after two steps.

    Args:
        pipe: in a step callback; its scheduler has just made a step.
        before: latents before the step, any shape.
        latents: after it.

    Returns:
        The guess, or `latents` when the scheduler doesn't say where it stands.
    """
    sigmas, index = getattr(pipe.scheduler, "sigmas", None), getattr(pipe.scheduler, "step_index", None)
    if sigmas is None or index is None or not 1 <= index < len(sigmas):
        return latents
    now, then = float(sigmas[index]), float(sigmas[index - 1])
    if not 0 <= now < then <= 1:
        return latents
    return latents - now * (latents - before) / (now - then)


def _arguments_of(
    unpack: object, pipe: DiffusionPipeline, height: int, width: int, num_frames: int | None
) -> dict[str, int] | None:
    """Fill in the arguments of a pipeline's own unpacking by their names; None if one is unknown.

    Pipelines of images count in pixels and take the scale; those of clips count in latent cells.
    """
    names = [name for name in inspect.signature(unpack).parameters if name != "latents"]  # type: ignore[arg-type]
    config = pipe.transformer.config
    known = {
        "height": height,
        "width": width,
        "vae_scale_factor": getattr(pipe, "vae_scale_factor", None),
        "patch_size": config.get("patch_size", 1),
        "patch_size_t": config.get("patch_size_t") or 1,
    }
    if "num_frames" in names:
        tokenizer = as_visual_tokenizer(pipe.vae)
        across = getattr(pipe, "vae_spatial_compression_ratio", tokenizer.spatial_compression_ratio)
        along = getattr(pipe, "vae_temporal_compression_ratio", tokenizer.temporal_compression_ratio)
        known |= {
            "height": height // across,
            "width": width // across,
            "num_frames": ((num_frames or 1) - 1) // along + 1,
        }
    filled = {name: known.get(name) for name in names}
    return None if None in filled.values() else {name: int(value) for name, value in filled.items() if value}
