"""Token layout of one forward pass: the image's grid, and the position of the text."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["self", "joint", "cross", "text", "unknown"]
"""Who looks at whom: image among itself, image and text among each other, image at text, text among itself;
"unknown" only where the network is not in the table and its structure doesn't tell."""

Axes = Literal["thw", "hw", "t", "window", "proxies", "thw_to_proxies"]
"""Which axes of the grid one sequence runs over; the others are folded into the batch. "window": the tokens of one
window of the grid; "proxies": averages of such windows; "thw_to_proxies": queries are all tokens, keys the averages."""

TextPosition = Literal["before", "after", "separate", "none", "unknown"]
"""Where text tokens stand in a joint sequence; "separate": they are only keys of cross-attention."""


@dataclass(frozen=True)
class TokenLayout:
    """The tokens that one call of a transformer works on.

    A joint sequence is `text, grid, extra` or `grid, extra, text`, as `text_position` says.

    Args:
        grid: latent tokens as (frames T, rows H, columns W); the sequence is row-major.
        text_length: text tokens L in the sequence, padding included where the network keeps it.
        text_position: where they stand.
        extra: tokens right behind the grid that are not of the generated image: a reference image, or padding.
        text_lengths: text tokens of each sample in the batch, where the network drops the padding sample by sample.
        padded_text_length: text tokens that the refiners of the text still see, where the joint sequence has fewer.
        window: tokens of a window, padding included, in networks that attend within windows; else 0.
        proxies: averages of windows that stand for all tokens, in networks that have them; else 0.
    """

    grid: tuple[int, int, int]
    text_length: int = 0
    text_position: TextPosition = "none"
    extra: int = 0
    text_lengths: tuple[int, ...] = ()
    padded_text_length: int | None = None
    window: int = 0
    proxies: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens N of the generated image or clip."""
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def in_sequence(self) -> bool:
        """Whether the text shares a sequence with the image."""
        return self.text_position in ("before", "after")

    @property
    def sequence_length(self) -> int:
        """Tokens of the sequence that the image is part of, text included where it is in it."""
        return self.num_tokens + self.extra + (self.text_length if self.in_sequence else 0)

    def image_slice(self, sample: int = 0) -> slice:
        """Return where the grid stands in the sequence.

        Args:
            sample: index in the batch; matters only where the samples' texts differ in length and stand before.
        """
        start = self._text_of(sample) if self.text_position == "before" else 0
        return slice(start, start + self.num_tokens)

    def text_slice(self, sample: int = 0) -> slice:
        """Return where the text stands in the sequence; empty if it is not in it.

        Args:
            sample: index in the batch.
        """
        if not self.in_sequence:
            return slice(0, 0)
        start = 0 if self.text_position == "before" else self.num_tokens + self.extra
        return slice(start, start + self._text_of(sample))

    def lengths(self, kind: Kind, axes: Axes = "thw", sample: int | None = None) -> tuple[int, int]:
        """Return number of queries and of keys in an attention layer of this kind.

        Args:
            kind: who looks at whom.
            axes: axes of the grid that its sequence runs over.
            sample: index in the batch, for networks that attend sample by sample; None for the batch's sequence.

        Raises:
            ValueError: the kind is "unknown".
        """
        frames, rows, columns = self.grid
        text = self.text_length if sample is None else self._text_of(sample)
        whole = self.num_tokens + self.extra
        sizes = {"thw": whole, "hw": rows * columns, "t": frames, "window": self.window, "proxies": self.proxies}
        image_tokens = whole if axes == "thw_to_proxies" else sizes[axes]
        match kind:
            case "self":
                return image_tokens, self.proxies if axes == "thw_to_proxies" else image_tokens
            case "joint":
                length = image_tokens + (text if self.in_sequence else 0)
                return length, length
            case "cross":
                return image_tokens, text
            case "text":
                length = self.padded_text_length or text
                return length, length
        raise ValueError(f"how many tokens an attention layer of kind {kind!r} sees is not known")

    def _text_of(self, sample: int) -> int:
        return self.text_lengths[sample] if self.text_lengths else self.text_length
