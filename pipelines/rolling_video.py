"""Clips made chunk by chunk with a causal transformer, which keeps keys and values of the frames before.

Each chunk is denoised once and then remembered, as in CausVid (arXiv 2412.07772) and Self Forcing (arXiv 2506.08009):
no frame is generated twice, as frames of overlapping windows are, and the memory is that of one window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit.layers.frame_memory import FrameMemory, chunk_spans
from pipelines.inputs.checks import check_generators
from pipelines.inputs.known_clip import KnownClip
from pipelines.inputs.windows import Window


def plan_chunks(num_frames: int, ratio: int, chunk_frames: int) -> list[Window]:
    """Divide a clip into the chunks that a causal transformer makes.

    Args:
        num_frames: of the clip.
        ratio: frames of a latent frame after the first.
        chunk_frames: latent frames of a chunk after the first frame.

    Returns:
        The chunks in order, in frames; none knows frames of the one before it but through the memory.
    """
    spans = chunk_spans(1 + -(-(num_frames - 1) // ratio), chunk_frames)
    edges = [0, *(min(1 + (stop - 1) * ratio, num_frames) for _, stop in spans)]
    return [Window(index, *edges[index : index + 2], known=0) for index in range(len(spans))]


class RollingRun:
    """A call of a pipeline whose transformer is causal.

    Args:
        pipe: a `FlowVideoPipeline`.
        call: a `VideoCall`; of the clip, at most the first frame may be known.
        size: height and width in pixels.
        chunks: of `plan_chunks`.

    Raises:
        ValueError: more than the first frame is known, starting noise of another shape is given, or the autoencoder
            can't decode in chunks.
    """

    def __init__(self, pipe: Any, call: Any, size: tuple[int, int], chunks: list[Window]) -> None:
        self.pipe, self.call, self.size, self.chunks = pipe, call, size, chunks
        self.ratio = pipe.visual_tokenizer.temporal_compression_ratio
        self.memory: FrameMemory = pipe.transformer.new_memory()
        self.first = self._first_frame(pipe._known_clip(call, *size))
        self.state: Any = None  # of the autoencoder
        if self.ratio > 1 and not hasattr(pipe.vae, "decode_chunk"):
            raise ValueError(
                f"vae is a {type(pipe.vae).__name__}, which can't decode in chunks: a causal transformer needs a "
                "CausalVideoAutoencoder or an autoencoder of single frames."
            )

    @property
    def num_runs(self) -> int:
        """How many chunks are denoised."""
        return len(self.chunks) - (self.first is not None)

    def latents(self, chunk: Window, text: dict[str, Any], denoise: Any) -> Tensor | None:
        """Make the latents of the next chunk, and remember them.

        Args:
            chunk: the next one.
            text: of the chunk, see `FlowVideoPipeline._encode_text`.
            denoise: takes noise (B, C, T', h, w) to latents, or to None if the run was interrupted; it passes
                `memory` on to the transformer.

        Returns:
            (B, C, T', h, w); None if the run was interrupted.
        """
        count = len(text["prompt_embeds"])
        if chunk.index == 0 and self.first is not None:
            latents = self.pipe.encode_clip(self.first.pixels).expand(count, -1, -1, -1, -1)  # (B, C, 1, h, w)
        else:
            latents = denoise(self._noise(chunk, count))
        if latents is not None and chunk is not self.chunks[-1]:
            self._remember(latents, text)
        return latents

    def pixels(self, chunk: Window, latents: Tensor) -> Tensor:
        """Decode the latents of the next chunk, (B, 3, T, H, W), about [-1, 1]."""
        if self.ratio == 1:
            pixels = self.pipe.decode_latents(latents)  # (B, 3, T, H, W)
        else:
            pixels, self.state = self.pipe.decode_next(latents, self.state)
        pixels = pixels[:, :, : chunk.length]
        return self.first.composite(pixels) if chunk.index == 0 and self.first is not None else pixels

    def _remember(self, latents: Tensor, text: dict[str, Any]) -> None:
        """Add finished latents to the memory, with the text of both sides of the guidance."""
        pipe, states, mask = self.pipe, text["prompt_embeds"], text["mask"]
        if pipe.do_classifier_free_guidance:
            latents = torch.cat([latents, latents])  # (2B, C, T', h, w)
            states = torch.cat([text["negative_prompt_embeds"], states])  # (2B, L, Dt)
        told = {name: value for name, value in pipe._network_arguments.items() if name != "memory"}
        pipe.transformer.remember(
            self.memory,
            latents.to(pipe.transformer.dtype),
            states,
            encoder_attention_mask=None if bool(mask.all()) else mask,
            attention_kwargs=pipe.attention_kwargs,
            **told,
        )

    def _noise(self, chunk: Window, count: int) -> Tensor:
        """Draw the noise of a chunk, or cut it from what the caller gives, (B, C, T', h, w)."""
        pipe, call = self.pipe, self.call
        check_generators(call.generator, count)
        f, total = pipe.vae_scale_factor, pipe.latent_frames(call.num_frames)
        first, stop = (pipe.latent_frames(frame) if frame else 0 for frame in (chunk.start, chunk.stop))
        frame_shape = (self.size[0] // f, self.size[1] // f)
        if call.latents is None:
            noise = pipe.prepare_noise(
                (pipe.transformer.out_channels, stop - first, *frame_shape), count, call.generator
            )
        else:
            wanted = (count, pipe.transformer.out_channels, total, *frame_shape)
            if call.latents.shape != wanted or not torch.isfinite(call.latents).all():
                raise ValueError(
                    f"latents must be finite and of shape {wanted} (clips, channels, all latent frames, height / {f}, "
                    f"width / {f}), got {tuple(call.latents.shape)}."
                )
            noise = call.latents[:, :, first:stop]
        return noise.to(pipe._execution_device, torch.float32)

    def _first_frame(self, known: KnownClip) -> KnownClip | None:
        """Return the first frame, if it is known."""
        if known.is_empty:
            return None
        first = known.part(0, 1)
        if first.mask.any() or not known.mask[1:].all():
            raise ValueError(
                "a causal transformer makes a clip frame after frame and can be given its first frame only: pass "
                "image, and neither last_image nor other known parts, or use a model with full attention."
            )
        return first
