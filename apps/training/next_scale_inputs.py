"""What a next-scale network is shown while it is fine-tuned: tokens of images and encoded captions, kept on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.training.config import ConfigError
from apps.training.data.file_rows import Bucket, FileRows
from apps.training.network_inputs import pipeline_key
from apps.training.tensor_cache import TensorCache
from dit.layers.scales import Grid
from pipelines.info.inspection import info_of
from pipelines.network_calls import prompt_argument

MEMORY = 2**30  # bytes of each cache that are kept in memory
FORMAT = 1  # changes when what is kept changes


class NextScaleInputs:
    """Inputs of the network of a next-scale pipeline, for images and captions.

    Args:
        pipe: The pipeline, before anything is put on its network.
        folder: Where the caches lie.
        max_length: Tokens kept of a caption; None is the model's limit.
    """

    def __init__(self, pipe: Any, folder: Path, max_length: int | None = None) -> None:
        self.pipe, self.info, self.max_length = pipe, info_of(pipe), max_length
        self.reads_text = pipe.transformer.config.text_dim is not None
        self.key = f"{FORMAT}|{pipeline_key(pipe)}"
        self.token_cache = TensorCache(folder / "tokens", MEMORY)
        self.text_cache = TensorCache(folder / "texts", MEMORY)
        self.longest = 1  # tokens of the captions that were prepared

    def size_step(self) -> int:
        """Return what heights and widths must be multiples of, in pixels."""
        return self.info.multiple

    def schedule(self, bucket: Bucket) -> tuple[Grid, ...]:
        """Return the rows and columns of each scale for a size of images.

        Raises:
            ConfigError: The model generates no images of this size.
        """
        _, height, width = bucket
        if (width, height) not in self.info.sizes:
            sizes = ", ".join(f"{wide} x {high}" for wide, high in self.info.sizes[:8])
            raise ConfigError(
                f"{type(self.pipe).__name__} generates no images of {width} x {height} pixels: set data.resolution to "
                f"the side of one of {sizes}"
            )
        return self.pipe.resolve_schedule(height, width) if self.reads_text else tuple(self.pipe.vae.grids)

    def own_schedule(self, bucket: Bucket) -> tuple[Grid, ...] | None:
        """Return `schedule` for tokenizers that serve many, else None."""
        schedule = self.schedule(bucket)
        return schedule if self.pipe.transformer.config.bitwise else None

    def tokens(self, rows: FileRows, numbers: list[int]) -> Tensor:
        """Return the tokens of rows of one bucket, all scales in a row: (B, L), or bits (B, L, d), int64 on the CPU."""
        grids = self.own_schedule(rows.bucket(numbers[0]))
        keys = [f"{self.key}|{grids}|{rows.content_key(number)}" for number in numbers]
        found = self.token_cache.get_list(keys, numbers, lambda missing: self._quantized(rows, missing))
        return torch.stack([entry["tokens"] for entry in found]).long()  # (B, L) or (B, L, d)

    def conditions(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the network's arguments for captions; an empty one is its own 'no text', or 'no class'.

        Returns:
            `class_labels` (B,), or `encoder_hidden_states` (B, M, Dt) float32 and `encoder_attention_mask` (B, M).
        """
        if not self.reads_text:
            try:
                labels = [prompt_argument(self.info, caption)[1][0] for caption in captions]
            except ValueError as error:
                raise ConfigError(f"data: {error}") from error
            return {"class_labels": torch.tensor(labels)}
        texts = [caption for caption in captions if caption.strip()]
        keys = [f"{self.key}|{self.max_length}|{caption}" for caption in texts]
        entries = self.text_cache.get_list(keys, texts, lambda missing: [self._encoded(text) for text in missing])
        found = dict(zip(texts, entries, strict=True))
        length = max([self.longest, *(len(entry["states"]) for entry in entries)])  # M
        rows = [self._padded(found.get(caption), length) for caption in captions]
        states, masks = zip(*rows, strict=True)
        return {"encoder_hidden_states": torch.stack(states), "encoder_attention_mask": torch.stack(masks)}

    def prepare(self, rows: FileRows, progress: Callable[[Any], Any]) -> None:
        """Compute all that is missing for rows and their captions, ahead of the training.

        Args:
            rows: Of files.
            progress: Wraps what is gone through, to show it.
        """
        for numbers in progress(list(rows.batches(8))):
            self.tokens(rows, numbers.tolist())
        for caption in progress(rows.captions_of_all()):
            found = self.conditions([caption])
            if self.reads_text:
                self.longest = max(self.longest, found["encoder_hidden_states"].shape[1])

    @torch.no_grad()
    def _quantized(self, rows: FileRows, numbers: list[int]) -> list[dict[str, Tensor]]:
        """Turn rows of one bucket into tokens."""
        vae, grids = self.pipe.vae, self.own_schedule(rows.bucket(numbers[0]))
        parameter = next(vae.parameters())
        pixels = rows.pixels(numbers).to(parameter.device, parameter.dtype)  # (B, 3, H, W)
        codes = vae.quantize(pixels) if grids is None else vae.quantize(pixels, grids)
        tokens = torch.cat(codes.indices, dim=1).to("cpu", torch.int32)  # (B, L) or (B, L, d)
        return [{"tokens": each} for each in tokens]

    @torch.no_grad()
    def _encoded(self, caption: str) -> dict[str, Tensor]:
        """Have the pipeline encode a caption."""
        states, mask, *_ = self.pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.max_length
        )  # (1, M, Dt), (1, M)
        return {"states": states[0].cpu(), "mask": mask[0].cpu()}

    @torch.no_grad()
    def _padded(self, entry: dict[str, Tensor] | None, length: int) -> tuple[Tensor, Tensor]:
        """Return states (M, Dt) and mask (M,) of a caption; without one the text that guidance steers away from."""
        if entry is None:
            null = self.pipe.transformer.null_text_embeds(length)[0].float().cpu()  # (M, Dt)
            return null, torch.ones(length, dtype=torch.bool)
        more = length - len(entry["states"])
        return F.pad(entry["states"].float(), (0, 0, 0, more)), F.pad(entry["mask"].bool(), (0, more))
