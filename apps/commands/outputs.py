"""Files that commands write: checked before any work is spent on them, and named as they were asked for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from apps.service.content_credentials import check_signing
from apps.service.events import Picture
from apps.service.media import save_mp4
from apps.service.metadata import ANIMATIONS, FORMATS, save_animation, save_picture, save_sidecar, sidecar_path
from apps.service.sound import read_sound
from apps.service.usage import UsageError, checking
from apps.service.writable import check_writable

DEFAULT_OUTPUT = Path("tessera.png")
"""What `tessera generate` writes unless a name is given; a file that has the name is kept, see `free_output`."""
MOST_NAMES = 100_000


def is_clip(path: Path) -> bool:
    """Whether a name is that of a clip, and can't be that of an image."""
    return path.suffix.lower() in (".mp4", ".gif")


def check_output(output: Path, sidecar: bool = False) -> None:
    """Refuse names of files that can't keep settings, and files that can't be written.

    Args:
        output: the name asked for.
        sidecar: whether a JSON file goes beside it.

    Raises:
        UsageError: neither a PNG, a WebP, an MP4 nor a GIF name, or not writable, or a signature that is configured and
            can't be made.
        ImportError: a signature is configured, and c2pa-python is not installed.
    """
    check_signing()
    if output.suffix.lower() not in (*FORMATS, *ANIMATIONS, ".mp4"):
        raise UsageError(
            f"{str(output)!r}: images are written as PNG or WebP, which keep their settings; use '.png' "
            "('.mp4', '.gif' or '.webp' for clips)."
        )
    check_writable(output)
    if sidecar:
        check_writable(sidecar_path(output))


def check_audio(audio: str | None, output: Path | None) -> None:
    """Refuse a sound that can't be read, or a file that can't hold any.

    Args:
        audio: see `with_sound`.
        output: the file asked for.

    Raises:
        UsageError: no such sound, or a GIF or WebP name.
    """
    if audio is None:
        return
    if output is not None and output.suffix.lower() in ANIMATIONS:
        raise UsageError(f"{str(output)!r} can't hold sound; write to a '.mp4' file, or leave out --audio.")
    with checking():
        read_sound(audio, 0.1)


def with_sound(picture: Picture, audio: str | None) -> Picture:
    """Return a clip with the sound of a file, or `apps.service.sound.SILENT`; with its own if none is named."""
    if audio is None or picture.clip is None:
        return picture
    return replace(picture, clip=replace(picture.clip, sound=read_sound(audio, picture.clip.seconds)))


def picture_paths(output: Path, num: int, sidecar: bool = False) -> list[Path]:
    """Name the files and make sure that they can be written, before any time is spent on generating.

    Args:
        output: the name asked for.
        num: how many images.
        sidecar: whether a JSON file goes beside each.

    Returns:
        `output` alone, or with -0, -1, ... before the ending.

    Raises:
        UsageError: no name of an image or a clip, or a file that can't be written.
    """
    paths = _numbered(output, num)
    for path in paths:
        check_output(path, sidecar)
    output.parent.mkdir(parents=True, exist_ok=True)
    return paths


def free_output(num: int, output: Path = DEFAULT_OUTPUT) -> Path:
    """Return the default name, or the next one that no file has: tessera.png, tessera-1.png, tessera-2.png ...

    Args:
        num: how many images; all of their files, with clips and settings beside them, have to be free.
        output: the first choice.

    Raises:
        FileExistsError: all names are taken.
    """
    for i in range(MOST_NAMES):
        candidate = output if i == 0 else output.with_stem(f"{output.stem}-{i}")
        paths = _numbered(candidate, num)
        beside = (
            *(path.with_suffix(".mp4") for path in paths),
            *(sidecar_path(path) for path in paths),
        )
        if not any(os.path.lexists(path) for path in (*paths, *beside)):
            return candidate
    raise FileExistsError(f"{output} and {MOST_NAMES - 1} names like it are taken; name a file with -o.")


def _numbered(output: Path, num: int) -> list[Path]:
    return [output] if num == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(num)]


def save(picture: Picture, path: Path, keep_settings: bool = True, sidecar: bool = False) -> list[Path]:
    """Write an image, or a clip with an image of it, or a clip alone.

    Args:
        picture: generated.
        path: PNG or WebP file; of a clip PNG receives some frames side by side, and the clip goes beside it as MP4, and
            MP4, GIF and WebP receive the clip itself.
        keep_settings: whether the image carries its settings; that it was generated stands in it in any case.
        sidecar: whether a JSON file beside it does.

    Returns:
        The files written.

    Raises:
        OSError: the file can't be written; the message names `path`, and not the partial file that became of it.
    """
    written = []
    settings = picture.metadata
    try:
        if picture.clip is not None and path.suffix.lower() in ANIMATIONS:
            written.append(
                save_animation(picture.clip.frames, picture.clip.fps, path, settings, keep_settings=keep_settings)
            )
        else:
            if not is_clip(path):
                written.append(save_picture(picture.image, path, settings, keep_settings=keep_settings))
            if picture.clip is not None:
                written.append(save_mp4(picture.clip, path.with_suffix(".mp4"), settings, keep_settings=keep_settings))
        if sidecar:
            written.append(save_sidecar(settings, path))
    except OSError as error:
        raise OSError(f"{str(path)!r} could not be written: {error.strerror or error}.") from error
    return written
