"""Tokens of clips, frame by frame in one sequence, as sequences within a frame or along time."""

from torch import Tensor


def within_frames(tokens: Tensor, num_frames: int) -> Tensor:
    """Fold frames into the batch: (B, T S, D) to (B T, S, D)."""
    return tokens.unflatten(1, (num_frames, -1)).flatten(0, 1)


def along_time(tokens: Tensor, num_frames: int) -> Tensor:
    """Fold the places of a frame into the batch: (B, T S, D) to (B S, T, D)."""
    return tokens.unflatten(1, (num_frames, -1)).transpose(1, 2).flatten(0, 1)


def frame_by_frame(tokens: Tensor, batch: int) -> Tensor:
    """Undo `along_time`: (B S, T, D) to (B, T S, D)."""
    return tokens.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
