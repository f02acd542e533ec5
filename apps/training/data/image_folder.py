"""A folder of images and clips; the captions of `cat.png` are the lines of `cat.txt` beside it, if there is one.

Folders in the folder are searched too; hidden files are not.
"""

from pathlib import Path

from apps.training.config import ConfigError
from apps.training.data.decode import CLIP_SUFFIXES, IMAGE_SUFFIXES
from apps.training.data.files import Entry


def list_folder(folder: Path, setting: str = "data.folder") -> list[Entry]:
    """List the images and clips of a folder, sorted by name.

    Args:
        folder: Searched with all its folders.
        setting: The setting that named it, for messages.

    Raises:
        ConfigError: If the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise ConfigError(f"{setting} = {str(folder)!r} is no folder; give the one that holds the images")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    found = [
        Entry(name.as_posix(), folder / name, _captions((folder / name).with_suffix(".txt")))
        for name in names
        if name.suffix.lower() in IMAGE_SUFFIXES | CLIP_SUFFIXES and not any(part[0] == "." for part in name.parts)
    ]
    if not found:
        accepted = ", ".join(sorted(IMAGE_SUFFIXES | CLIP_SUFFIXES))
        raise ConfigError(f"{setting} = {str(folder)!r} holds no images or clips; accepted are {accepted}")
    return found


def _captions(file: Path) -> tuple[str, ...]:
    """Read a caption from each line that is not empty; none if there is no file.

    Raises:
        ConfigError: If the file is no UTF-8 text.
    """
    if not file.is_file():
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no UTF-8 text: {error}; save it as UTF-8") from error
    return tuple(line.strip() for line in lines if line.strip())
