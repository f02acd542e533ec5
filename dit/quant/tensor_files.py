"""Tensors of safetensors files read one by one into memory of their own.

Loaders map whole files into memory. A tensor that is read through such a mapping and then copied, as prepacked weights
are, takes its memory twice for as long as the mapping lives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of number formats in safetensors headers."""


class _Place(NamedTuple):
    """Where a tensor lies."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorFiles:
    """Safetensors files, of which others have read the headers already.

    Args:
        files: paths; those that are no safetensors files are left out.

    Raises:
        ValueError: a header that can't be read.
    """

    def __init__(self, files: Iterable[str | PathLike[str]] = ()) -> None:
        self._places: dict[str, _Place] = {}
        for file in map(Path, files):
            if file.suffix == ".safetensors":
                self._places |= _places(file)

    def read(self, name: str) -> Tensor | None:
        """Return a tensor in memory of its own; None if no file holds it.

        Args:
            name: of the tensor.

        Raises:
            OSError: the file ends before the tensor does.
        """
        place = self._places.get(name)
        if place is None:
            return None
        tensor = torch.empty(place.size, dtype=torch.uint8)
        with place.file.open("rb", buffering=0) as opened:
            opened.seek(place.start)
            array: Any = tensor.numpy()
            memory, done = memoryview(array), 0
            while done < place.size:
                count = opened.readinto(memory[done:])
                if not count:
                    raise OSError(f"{place.file} was cut short within {name}: fetch it again")
                done += count
        return (
            tensor.view(place.dtype).reshape(place.shape) if place.size else torch.empty(place.shape, dtype=place.dtype)
        )


class UnmappedTensors(dict[str, Tensor]):
    """The tensors of mapped files by name; going through them reads each one into memory of its own.

    Args:
        mapped: tensors by name.
        files: that hold them; tensors that they don't hold stay as they are.
        left: names of tensors that stay as they are, too.
    """

    def __init__(self, mapped: Mapping[str, Tensor], files: TensorFiles, left: Collection[str]) -> None:
        super().__init__(mapped)
        self.files, self.left = files, left

    def items(self) -> Any:
        """Yield names and tensors."""
        for name, mapped in super().items():
            own = None if name in self.left else self.files.read(name)
            yield name, mapped if own is None else own


def _places(file: Path) -> dict[str, _Place]:
    """Read where the tensors of a file lie."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(min(length, file.stat().st_size))
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        return {name: _place(file, 8 + length, entry) for name, entry in entries.items() if entry["dtype"] in DTYPES}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no safetensors file, or is damaged: {error}") from error


def _place(file: Path, base: int, entry: dict) -> _Place:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of {entry['dtype']} {shape} has {stop - start} bytes")
    return _Place(file, base + start, stop - start, dtype, shape)
