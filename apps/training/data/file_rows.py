"""Files of several sizes as numbered rows, each an image or clip that may be mirrored; a batch has rows of one size."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from apps.training.data.base import BatchAddress, DataError
from apps.training.data.bucket_schedule import BucketSchedule
from apps.training.data.caption_rules import CaptionRules
from apps.training.data.clip_excerpts import FileFacts, read_excerpt
from apps.training.data.decode import Fit, to_size
from apps.training.data.files import Entry, file_stamp

Bucket = tuple[int, int, int]
"""Frames, height and width, (T, H, W)."""

KEY_FORMAT = 1  # to be raised when the same file gives other pixels, so that caches of the old ones are left alone
MIRRORED = 5  # series of random numbers: which of the rows of a batch are mirrored


@dataclass(frozen=True)
class Example:
    """One file.

    Attributes:
        entry: The file and its captions.
        facts: What is known of it.
        bucket: What size it is brought to.
        stamp: Size and time of the file when it was looked at, see `file_stamp`.
        repeats: How often it is seen in an epoch.
    """

    entry: Entry
    facts: FileFacts
    bucket: Bucket
    stamp: tuple[int, int]
    repeats: int = 1


@dataclass(frozen=True)
class Framing:
    """How a file becomes pixels, beside its bucket.

    Attributes:
        fit: See `apps.training.data.decode.to_size`.
        num_frames: Frames of an example of a clip; above 1, pixels have an axis of frames, also those of images.
        frame_rate: See `apps.training.data.clip_excerpts.read_excerpt`.
    """

    fit: Fit
    num_frames: int
    frame_rate: float | None


class FileRows:
    """Rows of a set of files. A row is a number from 0 to `len(rows) - 1` and stands for a file, mirrored or not.

    Args:
        examples: At least one.
        framing: How a file becomes pixels.
        rules: What the captions become.
        random_flip: Whether there are mirrored rows; row 2 i + 1 is then the mirrored row 2 i.
        series: Tells the sets of one run apart: their batches are drawn independently.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        framing: Framing,
        rules: CaptionRules,
        random_flip: bool = False,
        series: int = 0,
    ) -> None:
        self.examples = tuple(examples)
        self.framing, self.rules = framing, rules
        self.variants = 2 if random_flip else 1
        self.series = series
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.examples) * self.variants

    def draw(self, address: BatchAddress) -> np.ndarray:
        """Return the rows of a batch, all of one bucket, (B,) int64: a pure function of the address.

        Every file is seen `Example.repeats` times an epoch, in an order that differs from epoch to epoch, see
        `apps.training.data.bucket_schedule`; of its mirrored rows one is drawn by chance.
        """
        numbers = self._schedule.draw(address)  # (B,)
        if self.variants == 1:
            return numbers
        rng = np.random.default_rng((address.seed, address.number, self.series, MIRRORED))
        return numbers * 2 + rng.integers(2, size=len(numbers))

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Yield every row once, at most `size` at a time and of one bucket each, (b,) int64."""
        for bucket in sorted(self.histogram()):
            rows = np.array([row for row in range(len(self)) if self.bucket(row) == bucket], dtype=np.int64)
            for start in range(0, len(rows), size):
                yield rows[start : start + size]

    def pixels(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Decode rows of one bucket.

        Returns:
            float32 in [-1, 1], (B, 3, H, W); with `num_frames` above 1 it is (B, 3, T, H, W), where T is 1 for images.

        Raises:
            ValueError: If the rows are of several buckets.
            DataError: If a file cannot be read any more, or is another one than when the data was opened.
        """
        buckets = {self.bucket(row) for row in rows}
        if len(buckets) != 1:
            raise ValueError(f"rows of one bucket make a batch; these are of {sorted(buckets)}")
        clips = torch.stack([self._decode(row) for row in rows])  # (B, 3, T, H, W) uint8
        pixels = clips.float() / 127.5 - 1  # (B, 3, T, H, W)
        return pixels if self.framing.num_frames > 1 else pixels[:, :, 0]

    def caption(self, row: int, rng: np.random.Generator, drop: bool = True) -> str:
        """Draw a caption of a row; "" if it is dropped, or if there is none and no trigger.

        Args:
            row: Which row.
            rng: Source of the random numbers; two are taken.
            drop: Whether the caption may be dropped.
        """
        return self.rules.draw(self._example(row).entry.captions, rng, drop)

    def captions_of_all(self) -> list[str]:
        """Return every caption that may be drawn, sorted, each once; "" is among them if captions may be dropped."""
        return self.rules.every(example.entry.captions for example in self.examples)

    def captions_in(self, bucket: Bucket) -> list[str]:
        """Return every caption that may be drawn of rows of a bucket; as of `captions_of_all`."""
        return self.rules.every(example.entry.captions for example in self.examples if example.bucket == bucket)

    def bucket(self, row: int) -> Bucket:
        """Return frames, height and width of a row, (T, H, W)."""
        return self._example(row).bucket

    def histogram(self) -> dict[Bucket, int]:
        """Count the files of each bucket, those of the smallest (T, H, W) first."""
        return dict(sorted(Counter(example.bucket for example in self.examples).items()))

    def is_mirrored(self, row: int) -> bool:
        """Tell whether a row is the mirrored one of its file."""
        return int(row) % self.variants == 1

    def content_key(self, row: int) -> str:
        """Hash all that the pixels of a row depend on: the bytes of the file and not its name or time.

        Returns:
            64 hexadecimal digits.

        Raises:
            DataError: If the file cannot be read any more, or is another one than when the data was opened.
        """
        example = self._example(row)
        frames, height, width = example.bucket
        parts = {
            "format": KEY_FORMAT,
            "file": self._digest(int(row) // self.variants),
            "bucket": (height, width),
            "fit": self.framing.fit,
            "mirrored": self.is_mirrored(row),
            "frames": frames,
            "frame_rate": self.framing.frame_rate if frames > 1 else None,
            "has_frame_axis": self.framing.num_frames > 1,
        }
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def _schedule(self) -> BucketSchedule:
        """Batches of the numbers of examples."""
        seen: dict[Bucket, list[int]] = {bucket: [] for bucket in self.histogram()}
        for number, example in enumerate(self.examples):
            seen[example.bucket] += [number] * example.repeats
        return BucketSchedule(list(seen.values()), self.series)

    def _example(self, row: int) -> Example:
        """Return the file of a row.

        Raises:
            IndexError: If there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row = {row}: there are {len(self)} rows, from 0 on")
        return self.examples[int(row) // self.variants]

    def _digest(self, number: int) -> str:
        """Hash the bytes of a file, once."""
        if number not in self._digests:
            example = self.examples[number]
            _check_unchanged(example)
            with example.entry.path.open("rb") as file:
                self._digests[number] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[number]

    def _decode(self, row: int) -> Tensor:
        """Decode a row, uint8, (3, T, H, W)."""
        example, framing = self._example(row), self.framing
        frames, height, width = example.bucket
        _check_unchanged(example)  # or what is computed from it would be kept under the key of the other content
        try:
            images = read_excerpt(example.entry.path, frames, framing.frame_rate)
            clip = torch.stack([to_size(image, height, width, framing.fit) for image in images], dim=1)
        except Exception as error:  # any decoder, any kind of damage
            raise DataError(
                f"{example.entry.path} cannot be read any more ({type(error).__name__}: {error}); "
                "put it back, or start a new run"
            ) from error
        return clip.flip(-1) if self.is_mirrored(row) else clip  # (3, T, H, W)


def _check_unchanged(example: Example) -> None:
    """Check that a file is still the one that was looked at.

    Raises:
        DataError: If it is gone or another one.
    """
    try:
        stamp = file_stamp(example.entry.path)
    except OSError as error:
        raise DataError(
            f"{example.entry.path} cannot be read any more ({error}); put it back, or start a new run"
        ) from error
    if stamp != example.stamp:
        raise DataError(
            f"{example.entry.path} was changed since the run began; put it back and resume, or start a new run"
        )
