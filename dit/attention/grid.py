"""TokenGrid: what the tokens of one attention sequence are, in the order in which the network has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TextPosition = Literal["none", "first", "last"]


class Segment(NamedTuple):
    """A run of tokens of one kind: positions start to stop - 1 of the sequence."""

    kind: Literal["visual", "text", "extra"]
    start: int
    stop: int


@dataclass(frozen=True)
class TokenGrid:
    """Tokens of a sequence: a grid of visual ones (T, H, W) in raster order, and exact ones beside it.

    Exact tokens are those of the text and extra ones (references, audio, conditions): every pattern lets them see all
    tokens, and lets all tokens see them.

    Args:
        frames: T; 1 for images.
        height: rows H of tokens.
        width: columns W of tokens.
        text_length: text tokens L in the same sequence, padded ones included.
        text_position: where they stand; "none" without any.
        extra_length: further tokens, directly behind the grid's.

    Raises:
        ValueError: a size below 1, a negative length, or a text without a position.
    """

    frames: int
    height: int
    width: int
    text_length: int = 0
    text_position: TextPosition = "none"
    extra_length: int = 0

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ValueError(f"frames, height and width must be at least 1, got {self.shape}")
        if self.text_length < 0 or self.extra_length < 0:
            raise ValueError(
                f"text_length and extra_length must be at least 0, got {self.text_length} and {self.extra_length}"
            )
        if self.text_position not in ("none", "first", "last"):
            raise ValueError(f"text_position is {self.text_position!r}; use 'none', 'first' or 'last'")
        if (self.text_position == "none") != (self.text_length == 0):
            raise ValueError(
                f"text_position is {self.text_position!r} with {self.text_length} text tokens; use 'none' for a "
                "sequence without text, 'first' or 'last' for one with it"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The visual grid (T, H, W)."""
        return self.frames, self.height, self.width

    @property
    def visual_length(self) -> int:
        """Visual tokens T H W."""
        return self.frames * self.height * self.width

    @property
    def exact_length(self) -> int:
        """Tokens of the text and extra ones."""
        return self.text_length + self.extra_length

    @property
    def length(self) -> int:
        """All tokens N of the sequence."""
        return self.visual_length + self.exact_length

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The runs of tokens in the order of the sequence; empty ones are left out."""
        runs: list[tuple[Literal["visual", "text", "extra"], int]] = [
            ("visual", self.visual_length),
            ("extra", self.extra_length),
        ]
        runs.insert(0 if self.text_position == "first" else 2, ("text", self.text_length))
        return tuple(_place(runs))

    @property
    def visual_start(self) -> int:
        """Position of the first visual token in the sequence."""
        return self.text_length if self.text_position == "first" else 0

    def exact_positions(self) -> Tensor:
        """Return the positions of all exact tokens in the sequence, (exact_length,), rising."""
        runs = [torch.arange(one.start, one.stop) for one in self.segments if one.kind != "visual"]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)

    def coordinates(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return frame, row and column of visual tokens.

        Args:
            index: raster index among the visual tokens, any shape.
        """
        column = index % self.width
        row = index // self.width % self.height
        return index // (self.width * self.height), row, column


def _place(runs: list[tuple[Literal["visual", "text", "extra"], int]]) -> Iterator[Segment]:
    start = 0
    for kind, length in runs:
        if length:
            yield Segment(kind, start, start + length)
        start += length
