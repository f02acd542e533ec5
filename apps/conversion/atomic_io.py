"""What `tessera convert` reads and writes: whole or not at all, and never over something that is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor

from apps.service.usage import UsageError
from apps.service.writable import check_folder, check_writable
from dit.runtime.json_files import read_object
from pipelines.loading.components import check_component
from pipelines.loading.errors import clear_loading_errors
from pipelines.loading.load import as_dtype
from pipelines.loading.weight_values import check_weights

PICKLE_SUFFIXES = (".pt", ".pth")
"""What official code reads; the files hold tensors only."""


def check_new_folder(output: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ValueError: it does, or it is a file.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder; remove it or choose another --output")
    check_folder(output.parent)


def check_new_file(output: Path) -> None:
    """Refuse a file that exists, or one that no official code reads.

    Raises:
        ValueError: the file exists or has another suffix.
    """
    if output.suffix not in (*PICKLE_SUFFIXES, ".safetensors"):
        raise UsageError(f"{output.name} must end in .pt or .pth (what the official code reads) or .safetensors")
    if output.exists():
        raise UsageError(f"{output} exists; remove it or choose another --output")
    check_writable(output)


def write_state(state: Mapping[str, Tensor], output: Path, nest: str | None = None) -> None:
    """Write tensors to a file that takes its name when it is complete.

    Args:
        state: tensors by key.
        output: a path that passed `check_new_file`.
        nest: entry of the file that the official code looks for the tensors in; .safetensors files have no entries.
    """
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.part")
    try:
        if output.suffix in PICKLE_SUFFIXES:
            torch.save(state if nest is None else {nest: state}, partial)
        else:
            save_file(state, partial)
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)


def component_folder(folder: Path, name: str) -> Path:
    """Return the folder of a component, given its own folder or the pipeline's."""
    found = folder / name if (folder / name).is_dir() else folder
    if not (found / "config.json").is_file():
        raise UsageError(f"{folder} holds neither config.json nor {name}/config.json; pass a model's folder")
    return found


def read_component(source: Path, kinds: Sequence[type[ModelMixin]], family: str, dtype: str) -> Any:
    """Read the model to export: the one in a folder, or a pipeline's transformer.

    Args:
        source: a pipeline's folder or a component's.
        kinds: classes that the family can export.
        family: its name on the command line.
        dtype: "auto" keeps the folder's number format.

    Raises:
        OSError: its weight files are damaged.
        ValueError: no model there, one of another kind, or a configuration that doesn't fit its weights.
    """
    folder = component_folder(source, "transformer")
    name = read_object(folder / "config.json").get("_class_name")
    known = {kind.__name__: kind for kind in kinds}
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"{folder} holds a {name}; --family {family} exports a {' or a '.join(known)}")
    check_component(folder, known[name], dtype=None, variant=None, exact=True)
    with clear_loading_errors(folder):
        model: Any = known[name].from_pretrained(folder, use_safetensors=True)
    check_weights(model, str(folder))
    return model if dtype == "auto" else model.to(as_dtype(dtype))


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Return a folder beside `output` that takes its place when all went well and vanishes otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp keeps others out
        os.replace(folder, output)  # works over an empty folder too
    finally:
        shutil.rmtree(folder, ignore_errors=True)
