"""Training data: the still or moving sticker world, a folder of images or clips, or a list of files (`[data] kind`)."""

from pathlib import Path

from apps.training.data.base import TrainingData
from apps.training.data.config import ClipSection, SourceSection


def open_data(section: SourceSection, resolution: int, folder: Path, quiet: bool = False) -> TrainingData:
    """Open what the `[data]` section of a configuration names.

    Args:
        section: The validated section.
        resolution: Side of the images in pixels.
        folder: Folder of the run, where the list of files is kept.
        quiet: Whether another process tells what was found.

    Raises:
        ConfigError: If the data is missing or cannot be used.
    """
    if section.kind == "stickers":
        from apps.training.data.stickers import StickerData, StickerSettings

        return StickerData(StickerSettings.of(section), resolution)
    if section.kind == "moving_stickers":
        from apps.training.data.moving_stickers import MovingStickerData, MovingStickerSettings

        return MovingStickerData(MovingStickerSettings.of(section), resolution)
    from apps.training.data.files import FileData, usable_entries

    if section.kind == "images":
        from apps.training.data.image_folder import list_folder

        assert section.folder is not None, "the section has checked it"
        source, entries = f"data.folder = {str(section.folder)!r}", list_folder(section.folder)
    else:
        from apps.training.data.jsonl import list_lines

        assert section.file is not None, "the section has checked it"
        source, entries = f"data.file = {str(section.file)!r}", list_lines(section.file, section.folder)
    used = usable_entries(source, entries, folder / "data.json", quiet)
    frames = rate = None
    if isinstance(section, ClipSection):
        frames, rate = section.num_frames, section.frame_rates[0]
    return FileData(source, used, resolution, section.fit, section.held_out_fraction, frames, rate or 0.0)
