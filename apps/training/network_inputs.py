"""What a pipeline's network is shown while it is fine-tuned: latents and recorded arguments, both kept on disk."""

import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.training.config import ConfigError
from apps.training.data.file_rows import Bucket, FileRows
from apps.training.tensor_cache import TensorCache
from dit.tokenizers import as_visual_tokenizer
from pipelines.info.fingerprint import fingerprint
from pipelines.info.inspection import info_of
from pipelines.network_calls import (
    CallNotUnderstood,
    NetworkCall,
    from_tensors,
    learn_unguided_call,
    normalize_latents,
    pack_latents,
    prompt_argument,
    to_tensors,
)

MEMORY = 2**30  # bytes of each cache that are kept in memory
FORMAT = 3  # changes when what is kept changes


def pipeline_key(pipe: Any) -> str:
    """Return a text that differs between pipelines whose networks answer differently, also in other number formats."""
    dtypes = {
        name: sorted({str(weight.dtype) for weight in part.parameters()})
        for name, part in sorted(pipe.components.items())
        if isinstance(part, torch.nn.Module)
    }
    return f"{type(pipe).__name__}|{fingerprint(pipe)}|{dtypes}"


class NetworkInputs:
    """Inputs of a pipeline's network, for images and captions.

    Args:
        pipe: The pipeline, before anything is put on its network.
        network: Of the pipeline.
        folder: Where the caches lie.
        guidance: Told to networks that take the guidance scale as an input; None is the pipeline's default.
        options: Further arguments of the pipeline's call.
    """

    def __init__(
        self, pipe: Any, network: torch.nn.Module, folder: Path, guidance: float | None, options: dict[str, Any]
    ) -> None:
        self.pipe, self.network, self.info = pipe, network, info_of(pipe)
        self.guidance, self.options = guidance, options
        (name,) = (name for name, part in pipe.components.items() if part is network)
        self.key = f"{FORMAT}|{name}|{pipeline_key(pipe)}"
        self.latents_cache = TensorCache(folder / "latents", MEMORY)
        self.text_cache = TensorCache(folder / "arguments", MEMORY)
        self.calls: dict[Bucket, NetworkCall] = {}
        self._lock = threading.Lock()  # batches are made in a second thread

    def size_step(self) -> int:
        """Return what heights and widths must be multiples of, in pixels; the pipeline's own checks are asked too."""
        step = self.info.multiple
        if self.info.sizes:
            return step
        for _ in range(3):
            try:
                self._learn((1, 3 * step, 5 * step))
            except ValueError as error:
                wanted = re.search(r"(?:divisible by|multiple of) (\d+)", str(error))
                if wanted is None or math.lcm(step, int(wanted[1])) == step:
                    break  # something else is wrong with it: said when it is called at the sizes of the files
                step = math.lcm(step, int(wanted[1]))
            else:
                break
        return step

    def _learn(self, bucket: Bucket) -> NetworkCall:
        frames, height, width = bucket
        return learn_unguided_call(
            self.pipe, height, width, self._clip(frames), self.guidance, self.options, self.network
        )

    def _clip(self, frames: int) -> int | None:
        """Return the frames of a call: None for pipelines of images."""
        return frames if self.info.frames is not None else None

    def call(self, bucket: Bucket) -> NetworkCall:
        """Return how the network is called for frames, height and width.

        Raises:
            ConfigError: The pipeline's call isn't understood, or it refuses the size.
        """
        with self._lock:
            if bucket not in self.calls:
                frames, height, width = bucket
                try:
                    self.calls[bucket] = self._learn(bucket)
                except (CallNotUnderstood, ValueError) as error:
                    raise ConfigError(
                        f"{type(self.pipe).__name__} can't be fine-tuned on {width} x {height} pixels, {frames} "
                        f"frames: {error}"
                    ) from error
            return self.calls[bucket]

    def latents(self, rows: FileRows, numbers: list[int]) -> Tensor:
        """Return the latents of rows of one bucket as the pipeline denoises them, (B, ...) float32 on the CPU."""
        keys = [f"{self.key}|{rows.content_key(number)}" for number in numbers]
        found = self.latents_cache.get_list(keys, numbers, lambda missing: self._encoded(rows, missing))
        return torch.stack([entry["latents"] for entry in found]).float()  # (B, ...)

    def arguments(self, bucket: Bucket, captions: list[str]) -> list[dict[str, Any]]:
        """Return the further arguments of the network for captions, on the CPU; 0 in the place of noisy latents."""
        options = repr((bucket, self.guidance, sorted(self.options.items())))
        keys = [f"{self.key}|{options}|{caption}" for caption in captions]
        found = self.text_cache.get_list(
            keys, captions, lambda missing: [self._recorded(bucket, caption) for caption in missing]
        )
        call, parts = self.call(bucket), [from_tensors(entry) for entry in found]
        for part in parts:
            if call.sample_name not in part:
                part[call.sample_name] = call.put(torch.zeros(1, *call.sample_shape), None)
        return parts

    def prepare(self, rows: FileRows, progress: Callable[[Any], Any]) -> None:
        """Compute all that is missing for rows and their captions, ahead of the training.

        Args:
            rows: Of files.
            progress: Wraps what is gone through, to show it.
        """
        for numbers in progress(list(rows.batches(8))):
            self.latents(rows, numbers.tolist())
        for bucket, caption in progress([(each, text) for each in rows.histogram() for text in rows.captions_in(each)]):
            self.arguments(bucket, [caption])

    @torch.no_grad()
    def _encoded(self, rows: FileRows, numbers: list[int]) -> list[dict[str, Tensor]]:
        """Encode rows one by one: some autoencoders of diffusers fail on batches."""
        tokenizer, device = as_visual_tokenizer(self.pipe.vae), next(self.network.parameters()).device
        found = []
        for number in numbers:
            frames, height, width = bucket = rows.bucket(number)
            pixels = rows.pixels([number]).to(device, next(self.pipe.vae.parameters()).dtype)
            shape = self.call(bucket).sample_shape
            latents = self._encode(tokenizer, pixels)  # (1, C, [T,] h, w)
            packed = pack_latents(
                self.pipe, latents.float().cpu(), shape, height, width, self._clip(frames)
            )  # (1, ...)
            found.append({"latents": packed[0].half() if packed.abs().max() < 6e4 else packed[0]})
        return found

    def _encode(self, tokenizer: Any, pixels: Tensor) -> Tensor:
        """Encode pixels (1, 3, [T,] H, W) to normalised latents (1, C, [T,] h, w)."""
        if pixels.ndim == 4 and self.info.frames is not None:
            pixels = pixels[:, :, None]  # (1, 3, 1, H, W)
        takes_clips = any(weight.ndim == 5 for weight in self.pipe.vae.parameters()) or hasattr(self.pipe.vae, "stills")
        if pixels.ndim == 5 and not takes_clips:  # frame by frame, e.g. Latte's
            frames = pixels.transpose(1, 2).flatten(0, 1)  # (T, 3, H, W)
            encoded = normalize_latents(self.pipe, tokenizer.encode(frames, return_dict=False)[0])  # (T, C, h, w)
            return encoded.transpose(0, 1)[None]  # (1, C, T, h, w)
        return normalize_latents(self.pipe, tokenizer.encode(pixels, return_dict=False)[0])

    def _recorded(self, bucket: Bucket, caption: str) -> dict[str, Tensor]:
        """Have the pipeline encode a caption."""
        try:
            name, value = prompt_argument(self.info, caption)
        except ValueError as error:
            raise ConfigError(f"data: {error}") from error
        call = self.call(bucket)
        arguments = call.record(**{name: value})
        if _count(arguments[call.sample_name]) == math.prod(call.sample_shape):  # noise, and no channels beside it
            del arguments[call.sample_name]
        return {key: tensor.cpu() for key, tensor in to_tensors(arguments).items()}


def _count(value: Any) -> int:
    """Return how many numbers a tensor has, or a list of tensors."""
    return value.numel() if isinstance(value, Tensor) else sum(map(_count, value))
