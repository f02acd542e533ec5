"""Attention that looks back in time: which frames a chunk of a clip sees, and the keys and values kept of them.

A clip is made in chunks: its first latent frame, then `chunk_frames` at a time. A chunk sees itself and the
`window_frames` latent frames before it, as autoregressive video diffusion does (CausVid, arXiv 2412.07772, section
4.1; Self Forcing, arXiv 2506.08009, section 3.4, whose rolling cache this is). Finished frames never change, so their
keys and values are kept, and the memory for a clip of any length is that of one window.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LayerMemory:
    """Keys and values of the frames before a chunk, in one attention layer.

    Attributes:
        key, value: (B, M, K, E), keys with their rotary embedding; None before the first chunk.
        text_tokens: tokens at the start of a sequence that are not kept.
        records: whether the layer adds what it computes.
    """

    key: Tensor | None = None
    value: Tensor | None = None
    text_tokens: int = 0
    records: bool = False

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put what is kept before keys and values of a chunk, (B, L + N, K, E); record those of its frames.

        A batch of fewer rows than are kept (without guidance only the conditional half runs) takes the last ones.

        Returns:
            (B, M + L + N, K, E) each.
        """
        joined = key, value
        if self.key is not None and self.value is not None:
            rows = len(key)
            joined = torch.cat([self.key[-rows:], key], dim=1), torch.cat([self.value[-rows:], value], dim=1)
        if self.records:
            kept = 0 if self.key is None else self.key.shape[1]
            # Without the text, which stands between what is kept and the chunk's frames.
            self.key, self.value = (
                torch.cat([part[:, :kept], part[:, kept + self.text_tokens :]], dim=1) for part in joined
            )
        return joined


@dataclass
class FrameMemory:
    """Keys and values of the last frames of a clip, in all layers.

    Attributes:
        num_layers: attention layers.
        window_frames: latent frames that are kept at most.
        next_frame: index in the clip of the latent frame that comes next.
        frames: latent frames that are kept.
        layers: one for each layer.
    """

    num_layers: int
    window_frames: int
    next_frame: int = 0
    frames: int = 0
    layers: list[LayerMemory] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = [LayerMemory() for _ in range(self.num_layers)]

    def record(self, on: bool, text_tokens: int = 0) -> None:
        """Have the layers add what they compute from now on, or not."""
        for layer in self.layers:
            layer.records, layer.text_tokens = on, text_tokens

    def advance(self, frames: int, area: int) -> None:
        """Count recorded frames of `area` tokens each, and drop those that no later chunk sees.

        Raises:
            RuntimeError: a layer was left out when these frames were run, so it recorded nothing of them.
        """
        total, kept = self.frames + frames, min(self.frames + frames, self.window_frames)
        for number, layer in enumerate(self.layers):
            if layer.key is None or layer.value is None or layer.key.shape[1] != total * area:
                raise RuntimeError(
                    f"attention layer {number} recorded nothing of the frames {self.next_frame} to "
                    f"{self.next_frame + frames - 1}: something left it out, such as a cache across steps; detach that"
                )
            # Copies: views would keep all frames in memory.
            layer.key, layer.value = (part[:, (total - kept) * area :].clone() for part in (layer.key, layer.value))
        self.next_frame += frames
        self.frames = kept

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        parts = [part for layer in self.layers for part in (layer.key, layer.value) if part is not None]
        return sum(part.numel() * part.element_size() for part in parts)


def chunk_spans(num_frames: int, chunk_frames: int) -> list[tuple[int, int]]:
    """Divide latent frames into chunks.

    Args:
        num_frames: latent frames of a clip, at least 1.
        chunk_frames: of each chunk after the first frame; the last one may be shorter.

    Returns:
        First frame, and the one behind the last, of each.
    """
    starts = [0, *range(1, num_frames, chunk_frames)]
    return list(zip(starts, [*starts[1:], num_frames], strict=True))


def sees_frames(queries: Tensor, keys: Tensor, chunk_frames: int, window_frames: int) -> Tensor:
    """Tell which latent frames see which.

    Args:
        queries: indices of latent frames in the clip, (Q,).
        keys: as well, (M,).
        chunk_frames: latent frames of a chunk after the first frame.
        window_frames: latent frames before its chunk that a frame sees.

    Returns:
        Bool, (Q, M).
    """

    def chunk(frames: Tensor) -> Tensor:
        return (frames + chunk_frames - 1) // chunk_frames  # 0, then 1 for as many frames, ...

    starts = torch.where(queries > 0, (chunk(queries) - 1) * chunk_frames + 1, 0)  # (Q,)
    not_later = chunk(keys)[None] <= chunk(queries)[:, None]
    return not_later & (keys[None] >= starts[:, None] - window_frames)


def causal_mask(
    text_mask: Tensor | None, text_tokens: int, frames: Tensor, kept: Tensor, area: int, sees: Tensor
) -> Tensor:
    """Build the mask of a sequence of text and frames, whose keys begin with those of kept frames.

    The text sees itself only, so that what it says to frames doesn't depend on them.

    Args:
        text_mask: bool, (B, L), True for real tokens; None if all are.
        text_tokens: L.
        frames: indices of the F latent frames of the sequence, (F,).
        kept: of those kept before it, (M,).
        area: tokens of a frame.
        sees: of `sees_frames`, of the frames over the kept ones and themselves, (F, M + F).

    Returns:
        Bool, (B, 1, L + F area, M area + L + F area); B is 1 without a text mask.
    """
    device, (count, before) = sees.device, (len(frames), len(kept))
    shown = torch.ones(1, text_tokens, dtype=torch.bool, device=device) if text_mask is None else text_mask.bool()
    batch = len(shown)
    tokens = sees.repeat_interleave(area, dim=0).repeat_interleave(area, dim=1)  # (F S, (M + F) S)
    old, own = tokens[:, : before * area], tokens[:, before * area :]
    lower = torch.cat(
        [
            old.expand(batch, -1, -1),
            shown[:, None].expand(-1, count * area, -1),
            own.expand(batch, -1, -1),
        ],
        dim=2,
    )  # (B, F S, M S + L + F S)
    upper = torch.zeros(batch, text_tokens, lower.shape[2], dtype=torch.bool, device=device)
    # Text without a real token would see nothing, which a softmax can't: it sees all of the text.
    upper[:, :, before * area : before * area + text_tokens] = (shown | ~shown.any(dim=1, keepdim=True))[:, None]
    return torch.cat([upper, lower], dim=1)[:, None]
