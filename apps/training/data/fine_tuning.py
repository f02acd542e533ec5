"""Data of fine-tuning: a few files to train on, some of them held out, and class images beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from apps.training.config import ConfigError
from apps.training.data.buckets import Size, bucket_sizes, nearest_bucket
from apps.training.data.caption_rules import CaptionRules
from apps.training.data.clip_excerpts import FileFacts, inspect_file, is_clip
from apps.training.data.file_rows import Example, FileRows, Framing
from apps.training.data.files import Entry, file_stamp, inspect_entries, split_held_out
from apps.training.data.fine_tuning_config import FineTuningData
from apps.training.data.fine_tuning_report import describe, named
from apps.training.data.image_folder import list_folder
from apps.training.data.jsonl import list_lines

LEAST_TO_HOLD_OUT = 5  # files; fewer are all needed for training
TRAINING, CLASS, HELD_OUT = 0, 1, 2  # series of random numbers


class FineTuningSet(FileRows):
    """The rows to train on (see `FileRows`), and the other rows of a run.

    Args:
        examples: What batches are drawn from.
        framing: How a file becomes pixels.
        rules: What the captions become.
        random_flip: Whether there are mirrored rows.
        held_out: What is validated on: never mirrored, no caption dropped, always the first caption of a file.
        class_images: Rows of `data.class_folder`, None without one.
        notes: What was said when it was opened.

    Attributes:
        held_out, class_images, notes: As above.
        is_validated_on_training: Whether `held_out` are the files that are trained on.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        framing: Framing,
        rules: CaptionRules,
        random_flip: bool,
        held_out: FileRows,
        class_images: FileRows | None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(examples, framing, rules, random_flip, TRAINING)
        self.held_out, self.class_images, self.notes = held_out, class_images, tuple(notes)
        self.is_validated_on_training = held_out.examples == self.examples

    def captions_of_all(self) -> list[str]:
        """Return every caption that may be drawn of any row, also of those held out and of class images."""
        parts = [self.held_out, *([self.class_images] if self.class_images else [])]
        return sorted({*super().captions_of_all(), *(text for part in parts for text in part.captions_of_all())})


def open_fine_tuning(
    section: FineTuningData, resolution: int, step: int, run_folder: Path, quiet: bool = False
) -> FineTuningSet:
    """Open what the `[data]` section of a fine-tuning names.

    Args:
        section: The validated section; its `resolution` is not read.
        resolution: R in pixels: sizes have about R x R of them.
        step: What heights and widths must be multiples of, in pixels.
        run_folder: Folder of the run, where the lists of files are kept.
        quiet: Whether another process tells what was found.

    Raises:
        ConfigError: If the data is missing or cannot be used; with the setting, its value and the remedy.
    """
    reader = _Reader(section, _sizes(section, resolution, step), run_folder, quiet)
    source, entries = _listed(section)
    said = _check_captions(section, source, entries)
    examples, notes = reader.read(source, entries, "data.json", section.repeats)
    held_out, training, how = _split(examples, section.held_out_fraction)
    notes += [f"{source}: {note}" for note in (*said, how)]
    class_images, more = _class_images(reader, entries)
    notes += more
    console = Console(stderr=True, quiet=quiet)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    rules = CaptionRules(section.trigger, section.caption, section.caption_dropout)
    fixed = CaptionRules(section.trigger, section.caption, is_fixed=True)
    return FineTuningSet(
        training,
        reader.framing,
        rules,
        section.random_flip,
        FileRows(held_out, reader.framing, fixed, series=HELD_OUT),
        class_images,
        notes,
    )


@dataclass(frozen=True)
class _Reader:
    """Looks at files and gives each its size.

    Attributes:
        section: The section.
        sizes: (H, W) to choose from.
        run_folder: Where the lists of files are kept.
        quiet: Whether another process tells what was found.
    """

    section: FineTuningData
    sizes: list[Size]
    run_folder: Path
    quiet: bool

    @property
    def framing(self) -> Framing:
        """How a file becomes pixels."""
        return Framing(self.section.fit, self.section.num_frames, self.section.frame_rate)

    def read(self, source: str, entries: list[Entry], index: str, repeats: int) -> tuple[list[Example], list[str]]:
        """Return the files that can be used, sorted by name, and what there is to say about them.

        Raises:
            ConfigError: If there is none.
        """
        shown = [entry for entry in entries if _repeats(source, entry)]
        facts = inspect_entries(source, shown, self.run_folder / index, self.quiet, inspect_file)
        examples, short = [], []
        for entry in sorted(shown, key=lambda entry: entry.name):
            if entry.name not in facts:
                continue
            found = FileFacts(*facts[entry.name])
            if is_clip(entry.path) and not found.has_excerpt(self.section.num_frames, self.section.frame_rate):
                short.append(f"{entry.name} ({found.frames} frames, {found.seconds:.2f} s)")
                continue
            examples.append(self._example(entry, found, repeats * _repeats(source, entry)))
        notes = [f"left out {len(short)} clip(s) that are shorter than {self._wanted()}: {named(short)}"] * bool(short)
        if not examples:
            reasons = f"; {notes[0]}" if notes else ""
            raise ConfigError(
                f"{source} has 0 usable files of {len(entries)}; give at least 1 that can be decoded and whose weight "
                f"is not 0{reasons}"
            )
        return examples, [f"{source}: {note}" for note in [*notes, *describe(examples, self.framing)]]

    def _example(self, entry: Entry, facts: FileFacts, repeats: int) -> Example:
        height, width = nearest_bucket((facts.height, facts.width), self.sizes)
        frames = self.section.num_frames if is_clip(entry.path) else 1
        return Example(entry, facts, (frames, height, width), file_stamp(entry.path), repeats)

    def _wanted(self) -> str:
        """Say how long a clip has to be."""
        frames, rate = self.section.num_frames, self.section.frame_rate
        return f"data.num_frames = {frames}" + (f" at data.frame_rate = {rate}" if rate else "")


def _sizes(section: FineTuningData, resolution: int, step: int) -> list[Size]:
    """Return the sizes that images are brought to.

    Raises:
        ConfigError: If the resolution has none.
    """
    if section.aspect_ratio_buckets and resolution >= step:
        return bucket_sizes(resolution, step, section.max_aspect_ratio)
    if resolution < step or resolution % step:
        lower = resolution // step * step
        near = f"{lower} or {lower + step}" if lower else f"{step}"
        kind = f"at least {step}" if section.aspect_ratio_buckets else f"a multiple of {step}"
        raise ConfigError(f"data.resolution = {resolution} must be {kind} for this model: set it to {near}")
    return [(resolution, resolution)]


def _listed(section: FineTuningData) -> tuple[str, list[Entry]]:
    """List the files to train on, and name the setting that gave them."""
    if section.kind == "images":
        assert section.folder is not None, "the section has checked it"
        return f"data.folder = {str(section.folder)!r}", list_folder(section.folder)
    assert section.file is not None, "the section has checked it"
    return f"data.file = {str(section.file)!r}", list_lines(section.file, section.folder)


def _repeats(source: str, entry: Entry) -> int:
    """Return how often a file is seen as often as others: its weight.

    Raises:
        ConfigError: If that is not a whole number.
    """
    if entry.weight != int(entry.weight):
        raise ConfigError(
            f"{source}: weight = {entry.weight} of {entry.name}: in fine-tuning a file is seen a whole number of "
            "times an epoch; give 0, 1, 2, ..., and more repeats of the others"
        )
    return int(entry.weight)


def _class_images(reader: _Reader, entries: Sequence[Entry]) -> tuple[FileRows | None, list[str]]:
    """Open the class images if there are any, and return what there is to say about them.

    Args:
        reader: Looks at the files.
        entries: The files to train on.

    Raises:
        ConfigError: If they are missing, have no captions, or are among the files to train on.
    """
    section = reader.section
    if section.class_folder is None:
        return None, []
    source = f"data.class_folder = {str(section.class_folder)!r}"
    listed = list_folder(section.class_folder, "data.class_folder")
    bare = [entry.name for entry in listed if not entry.captions]
    if bare and not section.class_caption:
        raise ConfigError(
            f"{source}: {len(bare)} of its {len(listed)} files have no caption ({named(bare)}), and "
            "data.class_caption is empty: set it to what they show, e.g. data.class_caption = 'a photo of a cat'"
        )
    trained = {entry.path.resolve() for entry in entries}
    shared = [entry.name for entry in listed if entry.path.resolve() in trained]
    if shared:
        raise ConfigError(
            f"{source}: {len(shared)} of its files are trained on as well ({named(shared)}): move it out of the "
            "folder with the files to train on"
        )
    examples, notes = reader.read(source, listed, "class_data.json", 1)
    # Captions are dropped here too: what the model makes without a caption should not become the subject either.
    rules = CaptionRules("", section.class_caption, section.caption_dropout)
    return FileRows(examples, reader.framing, rules, section.random_flip, CLASS), notes


def _check_captions(section: FineTuningData, source: str, entries: Sequence[Entry]) -> list[str]:
    """Refuse files of which nothing would be said, and say which have no caption.

    Raises:
        ConfigError: If no file has a caption, and no setting gives one.
    """
    bare = [entry.name for entry in entries if not entry.captions]
    if section.trigger or section.caption or not bare:
        return []
    if len(bare) < len(entries):
        return [f"{len(bare)} file(s) have no caption and are trained with the empty one: {named(bare)}"]
    beside = "put 'a photo of a cat' into cat.txt beside cat.png" if section.kind == "images" else "add 'caption' to it"
    raise ConfigError(
        f"{source}: none of its {len(entries)} files has a caption, and data.trigger and data.caption are empty: "
        f"{beside}, or set one of both to a text that is not empty, e.g. data.caption = 'a photo of a sks cat'"
    )


def _split(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example], str]:
    """Return examples to validate on, examples to train on, and what to say about them."""
    count = len(examples)
    if not fraction or count < LEAST_TO_HOLD_OUT:
        reason = (
            f"data.held_out_fraction = {fraction}" if not fraction else f"{count} files are too few to hold one out"
        )
        said = f"no file is held out ({reason}): the validation loss is that of the training files on fixed noise"
        return list(examples), list(examples), f"{said}, and does not show overfitting"
    by_name = {example.entry.name: example for example in examples}
    held_out, training = split_held_out([example.entry for example in examples], fraction)
    said = f"{len(training)} files to train on, {len(held_out)} held out for validation"
    return [by_name[entry.name] for entry in held_out], [by_name[entry.name] for entry in training], said
