"""From the tokens of a call of a network to the grid of one attention call."""

from __future__ import annotations

from functools import lru_cache

from dit.attention.choices import StaysDense
from dit.attention.grid import TextPosition, TokenGrid
from dit.runtime.families.tokens import Axes, Kind, TokenLayout

_POSITIONS: dict[str, TextPosition] = {"before": "first", "after": "last"}

OTHER_LENGTH = "the sequence has another length than the grid"
RAGGED_TEXT = "texts of unequal length stand before the image"
NO_PLACE = "where the text stands is not known"
OTHER_AXES = "the layer attends along time, within windows or to averages"


@lru_cache(maxsize=256)
def grid_of(layout: TokenLayout, kind: Kind, axes: Axes, length: int) -> TokenGrid:
    """Return the grid of a sequence.

    Args:
        layout: the tokens of the network's call.
        kind: who looks at whom in the layer.
        axes: what axes of the grid its sequence runs over.
        length: tokens N of the sequence.

    Raises:
        StaysDense: there is none.
    """
    frames, rows, columns = layout.grid
    if axes == "hw":
        frames, extra = 1, 0
    elif axes == "thw":
        extra = layout.extra
    else:
        raise StaysDense(OTHER_AXES)
    text = length - frames * rows * columns - extra
    if text < 0 or (text > 0 and kind == "self"):
        raise StaysDense(OTHER_LENGTH)
    if text == 0:
        return TokenGrid(frames, rows, columns, extra_length=extra)
    if layout.text_position not in _POSITIONS:
        raise StaysDense(NO_PLACE)
    lengths = set(layout.text_lengths) or {layout.text_length}
    if text not in {*lengths, layout.text_length}:
        raise StaysDense(OTHER_LENGTH)
    if layout.text_position == "before" and len(lengths) > 1:
        raise StaysDense(RAGGED_TEXT)
    return TokenGrid(frames, rows, columns, text, _POSITIONS[layout.text_position], extra)
