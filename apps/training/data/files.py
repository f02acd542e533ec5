"""Files with captions as training data, whatever lists them: `image_folder` or `jsonl`.

Every file is decoded once before the training begins; what cannot be decoded is left out, named and counted. The list
is kept in `data.json` of the run's folder, so that a resumed run checks only files that are new or changed, and tells
when the data is no longer what the run began with.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from apps.training.config import ConfigError
from apps.training.data.base import VALIDATION_SEED, BatchAddress, DataError
from apps.training.data.decode import CLIP_SUFFIXES, Fit, has_clip_reader, read_frames, to_square
from pipelines.inputs.words import split_words, write_words

CHUNK = 64  # images that are yielded at once
CACHE_BYTES = 512 * 2**20  # of decoded images that are kept in memory
MAX_NAMED = 5  # skipped files that a message names; `data.json` lists all


@dataclass(frozen=True)
class Entry:
    """One file.

    Attributes:
        name: Unique name, for messages and for the choice of what is held out.
        path: Where it is.
        captions: Captions that fit it; may be empty.
        weight: How often it is drawn, relative to the others.
    """

    name: str
    path: Path
    captions: tuple[str, ...] = ()
    weight: float = 1.0


class FileExamples:
    """Files with their captions. See `apps.training.data.base.Examples`.

    Args:
        entries: Files that can be decoded.
        resolution: Side R of the images in pixels.
        fit: How an image becomes a square, see `apps.training.data.decode.to_square`.
        frames: T, for clips of as many frames, spread evenly over each file (an image stands still); None for images,
            of a clip the frame in the middle.
        frame_rate: Of clips, frames a second.

    Attributes:
        lengths, starts, spans, frame_rates: See `apps.training.data.base.ClipPool`.
    """

    def __init__(
        self, entries: Sequence[Entry], resolution: int, fit: Fit, frames: int | None = None, frame_rate: float = 0.0
    ) -> None:
        self.entries = entries
        self.resolution = resolution
        self.fit: Fit = fit
        self.frames, self.frame_rate = frames, frame_rate
        self.lengths = self.spans = np.full(len(entries), frames or 1)
        self.starts = np.zeros(len(entries), dtype=np.int64)
        self.frame_rates = np.full(len(entries), frame_rate)
        self.decoded: dict[int, Tensor] = {}
        self.room = CACHE_BYTES // (3 * resolution**2 * (frames or 1))

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, rows: Sequence[int]) -> Tensor:
        """Decode some of the files, (B, 3, R, R) or (B, 3, T, R, R)."""
        pixels = torch.stack([self._decode(int(row)) for row in rows])  # (B, 3, R, R) or (B, 3, T, R, R)
        return pixels.float() / 127.5 - 1

    def regions(self, rows: Sequence[int]) -> None:
        """Return None: no part of these images is measured apart."""

    def caption(self, row: int, rng: np.random.Generator) -> str:
        """Draw one of the captions of a file; "" if it has none."""
        captions = self.entries[row].captions
        return captions[int(rng.integers(len(captions)))] if captions else ""

    def fingerprint(self) -> str:
        """Hash names, sizes and times of the files, and how they become squares."""
        stamps = [(entry.name, *file_stamp(entry.path)) for entry in self.entries]
        clips = (
            [self.frames] if self.frames else []
        )  # images keep the fingerprints that they had before there were clips
        return hashlib.sha256(repr((stamps, self.resolution, self.fit, *clips)).encode()).hexdigest()

    def _decode(self, row: int) -> Tensor:
        pixels = self.decoded.get(row)
        if pixels is None:
            found = self._read(self.entries[row], self.frames or 1)
            pixels = torch.stack(found, dim=1) if self.frames else found[0]
            if len(self.decoded) < self.room:
                self.decoded[row] = pixels
        return pixels

    def _read(self, entry: Entry, frames: int) -> list[Tensor]:
        try:
            return [to_square(image, self.resolution, self.fit) for image in read_frames(entry.path, frames)]
        except Exception as error:
            raise DataError(
                f"{entry.path} cannot be read any more ({type(error).__name__}: {error}); "
                "put it back, or start a new run"
            ) from error


class FilePool(FileExamples):
    """Files that a generator is trained on. See `apps.training.data.base.ExamplePool`."""

    def draw(self, address: BatchAddress, rng: np.random.Generator, stage: Any) -> np.ndarray:
        """Return the rows of a batch, see `rows`; the stage and the random numbers are not needed."""
        del rng, stage
        return self.rows(address)

    def rows(self, address: BatchAddress) -> np.ndarray:
        """Return the rows of a batch, (B,).

        With equal weights every file is seen once an epoch, in an order that differs from epoch to epoch; otherwise
        rows are drawn independently, each with its weight.
        """
        count = len(self.entries)
        weights = np.array([entry.weight for entry in self.entries])
        if (weights != weights[0]).any():
            rng = np.random.default_rng((address.seed, address.index, address.rank, 1))  # a series of its own
            return rng.choice(count, address.size, p=weights / weights.sum())
        positions = address.number * address.size + np.arange(address.size)  # (B,) in the endless series of epochs
        return np.array([_order(count, address.seed, int(at // count))[at % count] for at in positions])


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch, (count,): a pure function of seed and epoch."""
    return np.random.default_rng((seed, epoch, 0, 2)).permutation(count)


class FileData:
    """Files with captions. See `apps.training.data.base.TrainingData`.

    Args:
        source: The setting that named the data, for messages.
        entries: Files that can be decoded, at least two.
        resolution: Side R of the images in pixels.
        fit: How an image becomes a square.
        held_out_fraction: Share of the files kept for validation, at least one file.
        frames, frame_rate: See `FileExamples`.

    Raises:
        ConfigError: If there are fewer than two files, or none to train on has a positive weight.
    """

    def __init__(
        self,
        source: str,
        entries: Sequence[Entry],
        resolution: int,
        fit: Fit,
        held_out_fraction: float,
        frames: int | None = None,
        frame_rate: float = 0.0,
    ) -> None:
        if len(entries) < 2:
            raise ConfigError(f"{source} has {len(entries)} usable files; give at least 2, one of them to validate on")
        self.resolution = resolution
        self.fit: Fit = fit
        self.frames, self.frame_rate = frames, frame_rate
        self.validation, train = split_held_out(entries, held_out_fraction)
        self.train = FilePool([entry for entry in train if entry.weight > 0], resolution, fit, frames, frame_rate)
        if not len(self.train):
            raise ConfigError(f"{source}: all files to train on have weight 0; give at least one a positive weight")

    def images(self, address: BatchAddress) -> Tensor:
        """Decode the images of a batch, (B, 3, R, R)."""
        return self.train.images(self.train.rows(address).tolist())

    def calibration_images(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Yield the first images of the training set, at most `CHUNK` at a time."""
        del batch_size
        count = min(count, len(self.train))
        for start in range(0, count, CHUNK):
            yield self.train.images(range(start, min(start + CHUNK, count)))

    def pool(self, size: int, stages: Sequence[Any], seed: int) -> FilePool:
        """Return all files to train on."""
        del size, stages, seed
        return self.train

    def held_out(self, count: int) -> FileExamples:
        """Return the first of the files kept for validation."""
        return FileExamples(self.validation[:count], self.resolution, self.fit, self.frames, self.frame_rate)

    def held_out_groups(self, count: int) -> dict[str, FileExamples]:
        """Return the files kept for validation as one group."""
        return {"held_out": self.held_out(count)}

    def corpus(self, count: int, seed: int) -> list[str]:
        """Return the captions of the training set, drawn without replacement if there are more than `count`."""
        every = [caption for entry in self.train.entries for caption in entry.captions]
        if len(every) <= count:
            return every
        chosen = np.random.default_rng((seed, VALIDATION_SEED)).choice(len(every), count, replace=False)
        return [every[number] for number in chosen]

    def captions(self, count: int, seed: int) -> tuple[str, ...]:
        """Draw captions of the training set."""
        every = [caption for entry in self.train.entries for caption in entry.captions] or [""]
        return tuple(
            every[number] for number in np.random.default_rng((seed, VALIDATION_SEED)).choice(len(every), count)
        )

    def write_vocabulary(self, folder: Path) -> None:
        """Write all words of the captions to `words.txt`; no file if there are no captions."""
        words = {word for entry in self.train.entries for caption in entry.captions for word in split_words(caption)}
        if words:
            write_words(words, folder)


def split_held_out(entries: Sequence[Entry], fraction: float) -> tuple[list[Entry], list[Entry]]:
    """Split files by a hash of their names, so that the order of a listing does not matter.

    Args:
        entries: At least two.
        fraction: Share of the first part, which gets at least one file and leaves at least one.

    Returns:
        Those held out, in the order of the hashes, and those to train on, sorted by name.
    """
    ranked = sorted(entries, key=lambda entry: hashlib.blake2b(entry.name.encode()).digest())
    count = min(max(1, round(fraction * len(ranked))), len(ranked) - 1)
    return ranked[:count], sorted(ranked[count:], key=lambda entry: entry.name)


def usable_entries(source: str, entries: Sequence[Entry], index: Path, quiet: bool) -> list[Entry]:
    """Leave out the files that cannot be decoded, and tell which.

    Args:
        source: The setting that named the data, for messages.
        entries: All files.
        index: `data.json` of the run's folder: what an earlier part of the run found; written anew.
        quiet: Whether another process tells.

    Returns:
        The files that can be decoded.

    Raises:
        ConfigError: If there are clips and PyAV is not installed.
    """
    usable = inspect_entries(source, entries, index, quiet)
    return [entry for entry in entries if entry.name in usable]


def inspect_entries(
    source: str, entries: Sequence[Entry], index: Path, quiet: bool, inspect: Callable[[Path], Any] | None = None
) -> dict[str, Any]:
    """Decode the files, tell which cannot be decoded, and keep what was found out about the others.

    Args:
        source: The setting that named the data, for messages.
        entries: All files.
        index: `data.json` of the run's folder: what an earlier part of the run found; written anew.
        quiet: Whether another process tells.
        inspect: Decodes a file and returns facts about it, a JSON value; None only decodes it.

    Returns:
        Facts by the names of the files that can be decoded, None for all of them without `inspect`.

    Raises:
        ConfigError: If there are clips and PyAV is not installed.
    """
    clips = [entry.name for entry in entries if entry.path.suffix.lower() in CLIP_SUFFIXES]
    if clips and not has_clip_reader():
        raise ConfigError(
            f"{source} has {len(clips)} clips ({clips[0]} ...), which need PyAV: pip install 'tessera[studio]', "
            "or leave them out"
        )
    console = Console(stderr=True, quiet=quiet)
    before: dict[str, Any] = json.loads(index.read_text()) if index.is_file() else {}
    known, known_facts = before.get("files", {}), before.get("facts", {})
    files, skipped, facts = {}, {}, {}
    for entry in track(entries, "checking files", console=console, transient=True):
        try:
            files[entry.name] = stamp = list(file_stamp(entry.path))
            is_known = known.get(entry.name) == stamp
            if inspect is not None:
                is_known = is_known and entry.name in known_facts
                facts[entry.name] = known_facts[entry.name] if is_known else inspect(entry.path)
            elif not is_known:
                read_frames(entry.path)
        except Exception as error:  # any decoder, any kind of damage: the file is named with what is wrong
            files.pop(entry.name, None)
            skipped[entry.name] = f"{type(error).__name__}: {error}"
    index.parent.mkdir(parents=True, exist_ok=True)
    found = {"source": source, "files": files, "skipped": skipped} | ({"facts": facts} if facts else {})
    index.write_text(json.dumps(found, indent=1))
    messages = [_count(entries, files), *_skipped(skipped, index), *_changed(before, files)]
    for message in messages:
        console.print(f"{source}: {message}", markup=False, highlight=False, soft_wrap=True)
    return {name: facts.get(name) for name in files}


def _count(entries: Sequence[Entry], files: dict[str, Any]) -> str:
    """Say how many files can be used."""
    used = [entry for entry in entries if entry.name in files]
    return f"{len(used)} files, {sum(not entry.captions for entry in used)} of them without a caption"


def _skipped(skipped: dict[str, str], index: Path) -> list[str]:
    """Say which files cannot be decoded, if there are any."""
    if not skipped:
        return []
    named = [f"{name} ({reason})" for name, reason in skipped.items()]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return [f"skipped {len(skipped)} broken file(s), listed in {index}: {', '.join(named[:MAX_NAMED])}{more}"]


def _changed(before: dict[str, Any], files: dict[str, Any]) -> list[str]:
    """Say how many files are not those of an earlier part of the run, if any."""
    known = before.get("files", {})
    if not before or before.get("files") == files:
        return []
    changed = sum(known.get(name) != files.get(name) for name in {*known, *files})
    return [f"{changed} file(s) differ from those that this run began with: it does not repeat its steps exactly"]


def file_stamp(path: Path) -> tuple[int, int]:
    """Return size and time of a file, which change with its content."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
