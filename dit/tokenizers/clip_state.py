"""What autoencoders of clips keep between the chunks of a clip, and the checks of chunks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit.layers.frame_window import KeyValue


@dataclass(frozen=True, slots=True)
class EncoderState:
    """What the encoder keeps of a clip between two chunks.

    Attributes:
        memory: keys and values of each block, of the last `encoder_window - 1` latent frames; empty for a window of 1.
        waiting: frames whose group isn't complete, (B, 3, R, H, W) with R below `temporal_patch_size`.
    """

    memory: tuple[KeyValue, ...]
    waiting: Tensor


@dataclass(frozen=True, slots=True)
class DecoderState:
    """What the decoder keeps of a clip between two chunks.

    Attributes:
        memory: keys and values of each block, of the last `decoder_window - 1` latent frames; empty for a window of 1.
        latent: the last latent frame's shape, (B, C, 0, H, W), which the next chunk must have.
    """

    memory: tuple[KeyValue, ...]
    latent: Tensor


def as_clip(x: Tensor) -> Tensor:
    """Return images (B, C, H, W) as clips of one frame, (B, C, 1, H, W).

    Raises:
        ValueError: a tensor that is neither an image nor a clip.
    """
    if x.ndim not in (4, 5):
        raise ValueError(f"expected (B, C, H, W) or (B, C, T, H, W), got a tensor of shape {tuple(x.shape)}")
    return x.unsqueeze(2) if x.ndim == 4 else x


def check_same_clip(chunk: Tensor, before: Tensor) -> None:
    """Refuse a chunk that differs from the one before in anything but its frames (axis 2).

    Raises:
        ValueError: another batch, other channels or another size.
    """
    expected = (*before.shape[:2], -1, *before.shape[3:])
    if (*chunk.shape[:2], -1, *chunk.shape[3:]) != expected:
        raise ValueError(
            f"the chunk has the shape {tuple(chunk.shape)}, but the clip so far has {expected} (-1: any number of "
            "frames); pass chunks of one clip, and None as the state of another"
        )
