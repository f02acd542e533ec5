"""Clips encoded ahead of training, with all that masks may show of them."""

from typing import Any

import torch
from torch import Tensor

from apps.training.config import ConfigError
from apps.training.data.base import Examples
from apps.training.latent_cache import chunks
from dit.tokenizers import CausalVideoAutoencoder, as_visual_tokenizer
from pipelines.inputs.known_latents import group_frames

CHUNK = 16  # clips that are encoded at once


@torch.no_grad()
def encode_clips(examples: Examples, vae: Any, device: torch.device, quiet: bool = True) -> Tensor:
    """Encode the clips of all examples, and each of their frames as if the clip stood still there.

    Returns:
        Normalised latents, (P, C, T' + T, h, w), float16 on the CPU: of the clips, then of their frames. For
        autoencoders of single frames the two are the same, and only the clips' are there.
    """
    tokenizer = as_visual_tokenizer(vae)

    def encode(pixels: Tensor) -> Tensor:
        encoded = tokenizer.encode(pixels.to(device), return_dict=False)[0]
        return tokenizer.normalize_latents(encoded).to("cpu", torch.float16)

    parts = []
    for clips in chunks(examples, quiet, CHUNK):  # (b, 3, T, H, W)
        latents = encode(clips)  # (b, C, T', h, w)
        if getattr(vae, "stacked", 1) > 1:
            latents = torch.cat([latents, vae.stills(latents, clips.shape[2])], dim=2)
        elif tokenizer.temporal_compression_ratio > 1:
            frames = encode(clips.transpose(1, 2).flatten(0, 1))  # (b T, C, h, w)
            stills = frames.unflatten(0, clips.shape[::2][:2]).transpose(1, 2)  # (b, C, T, h, w)
            latents = torch.cat([latents, stills], dim=2)
        parts.append(latents)
    return torch.cat(parts)


def split_latents(encoded: Tensor, frames: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Split what `encode_clips` gave of clips of T frames: (B, C, T', h, w), and that of frames (B, C, T, h, w)."""
    return (encoded, encoded) if ratio == 1 else (encoded[:, :, :-frames], encoded[:, :, -frames:])


def known_of(latents: Tensor, stills: Tensor, shown: Tensor, ratio: int) -> Tensor:
    """Return the latents that a transformer is shown of what is known; zeros where nothing is.

    Args:
        latents: Of clips, (B, C, T', h, w).
        stills: Of their frames, (B, C, T, h, w).
        shown: See `pipelines.inputs.known_latents.frames_shown`, (B, R, T', h, w).
        ratio: R.

    Returns:
        (B, C, T', h, w).
    """
    frames = group_frames(stills, ratio)  # (B, C, T', R, h, w)
    last = shown.transpose(1, 2).float().argmax(dim=2)[:, None, :, None]  # (B, 1, T', 1, h, w)
    still = frames.gather(3, last.expand(*frames.shape[:3], 1, -1, -1))[:, :, :, 0]  # (B, C, T', h, w)
    is_whole, is_shown = shown.all(dim=1, keepdim=True), shown.any(dim=1, keepdim=True)  # (B, 1, T', h, w)
    return torch.where(is_whole, latents, still).where(is_shown, 0.0)


def check_stills(vae: Any) -> None:
    """Check that latent frames are encoded on their own, so that what is known can be drawn after encoding.

    Raises:
        ConfigError: They depend on the frames before them.
    """
    looks_back = vae.config.get("encoder_window", 1) != 1
    is_framewise = isinstance(vae, CausalVideoAutoencoder) or as_visual_tokenizer(vae).temporal_compression_ratio == 1
    if looks_back or not is_framewise:
        raise ConfigError(
            f"data.vae is a {type(vae).__name__} whose latent frames depend on those before them, so clips that are "
            "known in part can't be encoded ahead: use a CausalVideoAutoencoder with encoder_window = 1, or set "
            "task.known_fraction = 0 and data.lengths of at most data.num_frames"
        )
