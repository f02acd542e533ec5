"""A folder of the owner's own models: what lies in it, told by names and headers, before any weight is read.

Files come from strangers: headers are checked and bounded, pickles are never opened, links that lead out of the folder
are not followed, and what can't be used is listed with the reason.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from dit.runtime.json_files import parse_object, read_object

logger = logging.getLogger(__name__)

FOLDER = "models"
"""Name of the folder beside the output folder."""
Kind = Literal["pipeline", "modular", "checkpoint", "gguf", "lora"]
INDEXES: Mapping[str, Kind] = {"model_index.json": "pipeline", "modular_model_index.json": "modular"}
ENDINGS: Mapping[str, Kind] = {".safetensors": "checkpoint", ".gguf": "gguf"}
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
"""Files of an adapter as PEFT saves it."""
LORA_NAME = re.compile(
    r"\.lora_(A|B|down|up)\b|\.lora\.(down|up)\.|^lora_(unet|te)|\.hada_w[12]|\.lokr_w[12]|\.lora_magnitude"
)
"""In names of tensors of adapters, of any dialect."""
MOST_ENTRIES = 2_000
"""Entries that are looked at, of one folder and of one model."""
MOST_FOUND = 500
DEPTH = 2
"""Folders below the folder of models that are looked into: `owner/name` is how people sort downloads."""
MAX_HEADER = 32 * 1024 * 1024
"""Bytes of a safetensors header that are read here; those of models have a few MB."""
MAX_INDEX = 1024 * 1024
"""Bytes of the index of a pipeline."""
KEPT = 4 * MOST_FOUND
"""Results of looking into files that are remembered, by path, size and time of change."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model, or an adapter, in the folder.

    Attributes:
        name: path below the folder, with slashes, without the ending of a file.
        path: where it lies.
        kind: of it.
        problem: why it can't be used; empty if nothing speaks against it.
    """

    name: str
    path: Path
    kind: Kind
    problem: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether it can be offered."""
        return not self.problem


def scan(folder: Path) -> list[FoundModel]:
    """List the models and adapters of a folder, by name.

    Args:
        folder: of the owner; one that isn't there holds nothing.

    Returns:
        Those that can be used, and those that can't with the reason.
    """
    root = folder.expanduser().resolve()
    found: dict[str, FoundModel] = {}
    for entry in _entries(root, DEPTH):
        one = _look(entry, root)
        if one is None:
            continue
        if one.name in found:
            one = replace(one, name=f"{one.name}{entry.suffix or '/'}")
        found[one.name] = one
        if len(found) == MOST_FOUND:
            logger.warning("%s holds more than %d models; the others are not offered", folder, MOST_FOUND)
            break
    return sorted(found.values(), key=lambda one: one.name.lower())


def look_at(path: Path) -> FoundModel | None:
    """Return what one file or folder is, wherever it lies; None for what is no model.

    Args:
        path: that the owner named; links in it may lead anywhere, as those of the Hub's cache do.
    """
    place = path.expanduser().resolve()
    return _look(place, Path(place.anchor))


def _entries(folder: Path, depth: int) -> Iterator[Path]:
    """Yield files and folders that may be models; a folder that is one is not looked into, nor is a link."""
    for path in _listed(folder):
        if path.is_symlink() or not path.is_dir() or _kind_of_folder(path) is not None or depth == 1:
            yield path
        else:
            yield from _entries(path, depth - 1)


def _listed(folder: Path) -> list[Path]:
    """Return what lies in a folder, by name, without hidden entries; nothing for one that can't be read."""
    try:
        with os.scandir(folder) as listing:
            names = [entry.name for _, entry in zip(range(MOST_ENTRIES), listing, strict=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s can't be read: %s", folder, error)
        return []
    if len(names) == MOST_ENTRIES:
        logger.warning("%s holds %d entries or more; only so many are looked at", folder, MOST_ENTRIES)
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _look(path: Path, root: Path) -> FoundModel | None:
    """Return what a file or folder is; None for what is no model."""
    is_dir = path.is_dir()
    kind = _kind_of_folder(path) if is_dir else _kind_of_ending(path)
    if kind is None:
        return None
    name = path.relative_to(root).as_posix()
    name = name if is_dir else name.removesuffix(path.suffix)
    shown = "".join(one if one.isprintable() else "\ufffd" for one in name)  # also names that are no UTF-8
    one = FoundModel(shown, path, kind)
    if shown != name:
        return replace(one, problem="its name holds characters that can't be shown; rename it")
    try:
        is_inside = path.resolve().is_relative_to(root)
    except (OSError, RuntimeError) as error:  # a link to itself
        return replace(one, problem=_shown(error, root))
    if not is_inside:
        return replace(one, problem="it is a link that leads out of the folder of models; move it there")
    try:
        return _look_into_folder(one, root) if is_dir else _look_into_file(one)
    except (OSError, ValueError, RecursionError) as error:
        return replace(one, problem=_shown(error, root))


def _kind_of_folder(path: Path) -> Kind | None:
    for index, kind in INDEXES.items():
        if (path / index).is_file():
            return kind
    return "lora" if all((path / one).is_file() for one in ADAPTER) else None


def _kind_of_ending(path: Path) -> Kind | None:
    """Return what a file may be by its ending."""
    suffix = path.suffix.lower()
    return "checkpoint" if suffix in PICKLES else ENDINGS.get(suffix)


def _look_into_folder(one: FoundModel, root: Path) -> FoundModel:
    """Refuse a folder with links that lead out, or without a readable index.

    Raises:
        ValueError: of such a folder.
        OSError: a file can't be read.
    """
    seen = 0
    for folder, folders, files in os.walk(one.path):  # it follows no links
        for name in (*folders, *files):
            seen += 1
            if seen > MOST_ENTRIES:
                raise ValueError(f"it holds more than {MOST_ENTRIES} files, which no model does")
            inner = Path(folder, name)
            if inner.is_symlink() and not inner.resolve().is_relative_to(root):
                raise ValueError(f"{inner.relative_to(one.path)} is a link that leads out of the folder of models")
    if one.kind == "lora":
        return one
    index = one.path / next(name for name, kind in INDEXES.items() if kind == one.kind)
    if index.stat().st_size > MAX_INDEX:
        raise ValueError(f"its {index.name} has {index.stat().st_size} bytes, expected at most {MAX_INDEX}")
    values = read_object(index)
    if not isinstance(values.get("_class_name", ""), str):
        raise ValueError("it brings pipeline code of its own, which is never run")
    return one


def _look_into_file(one: FoundModel) -> FoundModel:
    """Tell a checkpoint from an adapter by the names of its tensors.

    Raises:
        ValueError: it is a pickle, or no file of its kind.
        OSError: it is damaged.
    """
    found = one.path.stat()
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for whoever writes into it
        raise ValueError("it is no regular file")
    if one.path.suffix.lower() in PICKLES:
        raise ValueError("it is a pickle, which can run code on loading; get it as .safetensors or .gguf")
    kind, problem = _read_kind(str(one.path), one.kind, found.st_size, found.st_mtime_ns)
    return replace(one, kind=kind, problem=problem)


@lru_cache(KEPT)
def _read_kind(path: str, kind: Kind, size: int, changed: int) -> tuple[Kind, str]:
    """Read the header of a file.

    Args:
        path: of the file.
        kind: by its ending.
        size: in bytes; with `changed` it tells whether the file is still the same.
        changed: nanoseconds since the epoch.

    Returns:
        What it holds, and why it can't be used.
    """
    try:
        is_lora = _is_lora(Path(path), kind)
    except (OSError, ValueError, RecursionError) as error:
        return kind, _shown(error, Path(path).parent)
    return ("lora" if is_lora else kind), ""


def _is_lora(path: Path, kind: Kind) -> bool:
    """Read the header of a file, and tell whether it is of an adapter.

    Raises:
        OSError: it is damaged.
        ValueError: its header is too long, or holds nothing.
    """
    from pipelines.loading.gguf_files import read_gguf_header
    from pipelines.loading.weight_files import read_header

    if kind == "gguf":
        if not read_gguf_header(path):
            raise ValueError("it holds no tensors")
        return False
    check_header_length(path)
    tensors = read_header(path)
    if not tensors:
        raise ValueError("it holds no tensors")
    return any(LORA_NAME.search(tensor) for tensor in tensors)


def check_header_length(path: Path) -> None:
    """Refuse a safetensors file whose header is longer than that of any model.

    Raises:
        ValueError: it is.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < length <= path.stat().st_size:
        raise ValueError(f"its header has {length} bytes, expected at most {MAX_HEADER}")


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file; empty where there is none.

    Raises:
        OSError: it can't be read.
        ValueError: its header is no JSON, or too long.
    """
    check_header_length(path)
    with path.open("rb") as file:
        text = file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER))
    values = parse_object(text, path.name).get("__metadata__")
    found = values if isinstance(values, dict) else {}
    return {str(name): value for name, value in found.items() if isinstance(value, str)}


def _shown(error: BaseException, root: Path) -> str:
    """Return a reason for the owner, in one line, with paths as they are below the folder."""
    return " ".join(str(error).replace(f"{root}{os.sep}", "").split())[:300]
