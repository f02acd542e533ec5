"""What a training task asks of its data.

A batch has an address: the seed of the run and the number of the batch. Everything that the data draws is a pure
function of that address, so a resumed run sees the batches that an uninterrupted one would have seen.

Images are float32 in [-1, 1], square, `resolution` pixels a side. Data of clips gives (B, 3, T, R, R) wherever data of
images gives (B, 3, R, R).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

VALIDATION_SEED = 2**40
"""Seed of everything that is held out: the same for every run, so that runs can be compared."""


class DataError(RuntimeError):
    """A file that was fine when the run began cannot be read any more."""


@dataclass(frozen=True)
class BatchAddress:
    """Which batch of which run.

    Attributes:
        seed: Seed of the run.
        index: Number of the batch in this process.
        size: Examples in the batch.
        step: The optimizer step that it belongs to.
        rank: Number of this process.
        world_size: Number of processes.
    """

    seed: int
    index: int
    size: int
    step: int = 0
    rank: int = 0
    world_size: int = 1

    @property
    def number(self) -> int:
        """Number of the batch over all processes."""
        return self.index * self.world_size + self.rank

    def rng(self) -> np.random.Generator:
        """Return the random generator of this batch."""
        return np.random.default_rng((self.seed, self.index, self.rank))


class Examples(Protocol):
    """A finite list of images with captions; a row is a number from 0 to `len(examples) - 1`."""

    def __len__(self) -> int: ...

    def images(self, rows: Sequence[int]) -> Tensor:
        """Return the images of some rows, (B, 3, R, R)."""
        ...

    def regions(self, rows: Sequence[int]) -> Tensor | None:
        """Return a mask of the pixels that are measured apart as well, bool, (B, 1, R, R); None if there are none."""
        ...

    def caption(self, row: int, rng: np.random.Generator) -> str:
        """Draw one of the captions that fit a row; "" if it has none."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of all that the images depend on, for caches of what is computed from them."""
        ...


class ExamplePool(Examples, Protocol):
    """Examples that are encoded ahead of the training, and which of them a batch holds."""

    def draw(self, address: BatchAddress, rng: np.random.Generator, stage: Any) -> np.ndarray:
        """Draw the rows of a batch.

        Args:
            address: Which batch.
            rng: Source of random numbers of this batch; the caller goes on with it.
            stage: The part of the curriculum, `apps.training.data.config.Stage`.

        Returns:
            Row numbers, (B,).
        """
        ...


class ClipPool(ExamplePool, Protocol):
    """Clips that are encoded ahead; all rows of a batch have the same length.

    Attributes:
        lengths: Frames of each example, (P,); those beyond repeat its last one.
        starts: Number of an example's first frame in its whole clip, (P,).
        spans: Frames of the whole clip that an example is an excerpt of, (P,).
        frame_rates: Frames a second, (P,).
    """

    lengths: np.ndarray
    starts: np.ndarray
    spans: np.ndarray
    frame_rates: np.ndarray


class TrainingData(Protocol):
    """Images and captions to train on. Made by `apps.training.data.open_data`."""

    resolution: int

    def images(self, address: BatchAddress) -> Tensor:
        """Return a batch of images, (B, 3, R, R)."""
        ...

    def calibration_images(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Yield `count` images that statistics are fitted to, at most 64 at a time, (b, 3, R, R).

        Args:
            count: How many; data that has fewer yields all it has.
            batch_size: Examples in a batch of the run.
        """
        ...

    def pool(self, size: int, stages: Sequence[Any], seed: int) -> ExamplePool:
        """Return the examples that a generator is trained on.

        Args:
            size: How many to make, if the data is endless.
            stages: The curriculum, see `apps.training.data.config.Stage`.
            seed: Seed of the run.
        """
        ...

    def held_out(self, count: int) -> Examples:
        """Return at most `count` examples that no batch holds."""
        ...

    def held_out_groups(self, count: int) -> Mapping[str, Examples]:
        """Return the kinds of held-out examples that are measured apart, at most `count` of each."""
        ...

    def corpus(self, count: int, seed: int) -> list[str]:
        """Return at most `count` captions to train a tokenizer on."""
        ...

    def captions(self, count: int, seed: int) -> tuple[str, ...]:
        """Draw `count` captions to generate from."""
        ...

    def write_vocabulary(self, folder: Path) -> None:
        """Write the words of the captions into the folder of an exported pipeline."""
        ...
