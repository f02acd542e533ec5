"""Names of the layers of a family: diffusers' and those of the code that first published the network.

Original layers are often several of diffusers in one: `double_blocks.0.img_attn.qkv` of FLUX holds the rows of `to_q`,
`to_k` and `to_v`. A rule names both sides, in the order of the rows; "#" stands for the number of a block. Where the
original code isn't known here, or no tool names layers after it, `original` is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Sizes = Literal["equal", "square", "mlp", "grouped"]


@dataclass(frozen=True)
class LayerNames:
    """One kind of layer, by both names.

    Args:
        parts: diffusers' names, in the order of the rows of the original layer.
        original: name in the original code; None if there is none.
        sizes: rows of the parts. "equal": all the same; "square": as many as inputs; "mlp": query, key and value have
            as many as the layer has inputs, and the rest belongs to the feed-forward (four times the inputs);
            "grouped": the query has as many as there are inputs, key and value share the rest.
        swapped: the halves of the rows change places (shift and scale of an adaptive norm).
        row_ratio: rows of the layer divided by its inputs, where that tells it from another layer of the same name.
    """

    parts: tuple[str, ...]
    original: str | None
    sizes: Sizes = "equal"
    swapped: bool = False
    row_ratio: int | None = None

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], re.Pattern[str]], ...]:
        """Patterns of all names, the original first, each with dots and with underscores for dots."""
        names = ("" if self.original is None else self.original, *self.parts)
        return tuple((_pattern(name), _pattern(name.replace(".", "_"))) for name in names)

    def match_original(self, name: str, flat: bool) -> str | None:
        """Return the number of the block ("" if it has none) that an original name means; None if it is another name.

        Args:
            name: without prefix.
            flat: it has underscores for dots.
        """
        return None if self.original is None else _number(self._patterns[0][flat], name)

    def match_part(self, name: str, flat: bool) -> tuple[int, str] | None:
        """Return which part a diffusers name is and the number of its block; None if it is another name."""
        for index, patterns in enumerate(self._patterns[1:]):
            number = _number(patterns[flat], name)
            if number is not None:
                return index, number
        return None


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)"))


def _number(pattern: re.Pattern[str], name: str) -> str | None:
    match = pattern.fullmatch(name)
    return None if match is None else "".join(match.groups())


def block(original: str | None, diffusers: str, names: Mapping[str, str], **options: Any) -> tuple[LayerNames, ...]:
    """Return the rules of a block.

    Args:
        original: prefix of the original names with its dot, e.g. "blocks.#."; None if they are not known.
        diffusers: prefix of diffusers' names with its dot.
        names: original name -> diffusers' names, separated by spaces.
        **options: as for `LayerNames`.
    """
    return tuple(
        LayerNames(
            tuple(diffusers + part for part in parts.split()), None if original is None else original + name, **options
        )
        for name, parts in names.items()
    )


def same(prefix: str, names: str) -> tuple[LayerNames, ...]:
    """Return the rules of layers that have one name everywhere.

    Args:
        prefix: of the names, with its dot.
        names: separated by spaces.
    """
    return tuple(LayerNames((prefix + name,), prefix + name) for name in names.split())


def unknown(prefix: str, names: str) -> tuple[LayerNames, ...]:
    """Return the rules of layers whose original names are not known; arguments as for `same`."""
    return tuple(LayerNames((prefix + name,), None) for name in names.split())


TIME_TEXT = "time_text_embed."
ATTENTION = "to_q to_k to_v to_out.0"
FEED_FORWARD = "ff.net.0.proj ff.net.2"
SELF_ATTENTION = " ".join(f"attn.{name}" for name in ATTENTION.split())


def attention(*names: str) -> str:
    """Return the projections of attention layers, separated by spaces."""
    return " ".join(f"{name}.{projection}" for name in names for projection in ATTENTION.split())
