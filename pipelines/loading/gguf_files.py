"""GGUF files: their header read strictly before the reader of the format sees the file, and scales of their weights.

The reader takes every count and length in a file at its word, so that a damaged file can ask it for any amount of time
or memory. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_TENSORS = 100_000
MAX_KEYS = 10_000
MAX_TEXT = 2**20
MAX_DIMENSIONS = 4
ALIGNMENT_KEY = "general.alignment"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a value's type -> its format; 8 is text and 9 an array."""

BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66),
}  # fmt: skip
"""Number of a tensor's type -> values and bytes of a block."""

SCALES: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((0, 2),), 3: ((0, 4),), 6: ((0, 2),), 7: ((0, 4),), 8: ((0, 2),),
    10: ((80, 84),), 11: ((108, 110),), 12: ((0, 4),), 13: ((0, 4),), 14: ((208, 210),),
}  # fmt: skip
"""Number of a tensor's type -> where the float16 scales stand in a block."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        kind: number of its type.
        shape: of its values, in torch's order.
        offset: of its first byte behind the header.
        nbytes: in the file.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_gguf_header(path: Path) -> dict[str, GgufTensor]:
    """Read what a GGUF file holds without reading its weights.

    Args:
        path: the file.

    Returns:
        Name -> tensor.

    Raises:
        OSError: no GGUF file, one that was cut short, or a header that contradicts itself.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            tensors, start = _Header(file, size).read()
        except (struct.error, UnicodeDecodeError) as error:
            raise OSError(f"{path} is no GGUF file, or was cut short: fetch it again.") from error
        except ValueError as error:
            raise OSError(f"{path} is no GGUF file that can be read: {error}. Fetch it again.") from error
    end = max((start + tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    if end > size:
        raise OSError(f"{path} was cut short, {size} of {end} bytes are there: fetch it again.")
    return tensors


class _Header:
    """The header of one file, read from front to back."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.alignment = 32

    def read(self) -> tuple[dict[str, GgufTensor], int]:
        """Read all of it: the tensors, and where their bytes begin."""
        if self.file.read(4) != MAGIC:
            raise ValueError("it doesn't begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, expected one of {VERSIONS}")
        tensors = self.count("number of tensors", "Q", MAX_TENSORS)
        keys = self.count("number of keys", "Q", MAX_KEYS)
        for _ in range(keys):
            self.pair()
        listed = dict(self.tensor() for _ in range(tensors))
        if len(listed) != tensors:
            raise ValueError("two of its tensors have one name")
        here = self.file.tell()
        return listed, here + -here % self.alignment

    def number(self, form: str) -> Any:
        """Read a number."""
        return struct.unpack("<" + form, self.file.read(struct.calcsize("<" + form)))[0]

    def count(self, what: str, form: str, limit: int) -> int:
        """Read a number that something of that length follows."""
        found = self.number(form)
        if found > limit:
            raise ValueError(f"its {what} is {found}, expected at most {limit}")
        return found

    def text(self) -> str:
        """Read a text."""
        return self.file.read(self.count("length of a text", "Q", min(MAX_TEXT, self.size))).decode()

    def pair(self) -> None:
        """Read a key and its value."""
        key, kind = self.text(), self.number("I")
        value = self.value(kind)
        if key == ALIGNMENT_KEY:
            if not isinstance(value, int) or not 1 <= value <= 2**20:
                raise ValueError(f"{ALIGNMENT_KEY} is {value!r}, expected a whole number from 1")
            self.alignment = value

    def value(self, kind: int) -> Any:
        """Read a value; arrays are passed over, they can't hold arrays here."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == 8:
            return self.text()
        if kind != 9:
            raise ValueError(f"a value has the type {kind}, expected 0 to 12")
        inner = self.number("I")
        length = self.count("length of an array", "Q", self.size)
        if inner == 8:
            for _ in range(length):
                self.text()
        elif inner in SCALARS:
            self.file.seek(struct.calcsize("<" + SCALARS[inner]) * length, 1)
        else:
            raise ValueError(f"an array has the type {inner}, expected numbers or texts")
        return None

    def tensor(self) -> tuple[str, GgufTensor]:
        """Read the entry of a tensor."""
        name = self.text()
        sides = [self.number("Q") for _ in range(self.count("number of dimensions", "I", MAX_DIMENSIONS))]
        kind, offset = self.number("I"), self.number("Q")
        if kind not in BLOCKS:
            raise ValueError(f"{name!r:.80} has the type {kind}, expected one of {sorted(BLOCKS)}")
        values, nbytes = BLOCKS[kind]
        if not all(1 <= side <= 2**40 for side in sides) or (sides and sides[0] % values):
            raise ValueError(f"{name!r:.80} has the shape {sides}, expected multiples of {values} from 1")
        return name, GgufTensor(kind, tuple(sides[::-1]), offset, math.prod(sides) // values * nbytes)


def quantized_scales(tensor: Tensor) -> Tensor | None:
    """Return the scales in the blocks of a quantized GGUF weight, float16; None for a tensor of another kind.

    Args:
        tensor: any; those of diffusers' GGUF loader have a `quant_type`.
    """
    kind = getattr(tensor, "quant_type", None)
    if kind is None or int(kind) not in SCALES:
        return None
    packed = torch.Tensor.as_subclass(tensor.detach(), Tensor)
    blocks = packed.reshape(-1, BLOCKS[int(kind)][1])  # (blocks, bytes)
    parts = [blocks[:, start:stop].contiguous().view(torch.float16) for start, stop in SCALES[int(kind)]]
    return torch.cat(parts, dim=1)
