"""What the caption of a file becomes in fine-tuning: a trigger before it, another one in its place, or none."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CaptionRules:
    """Rules that hold for all files of a set.

    Attributes:
        trigger: Words put before every caption that does not have them already; alone where there is no caption.
        fallback: Caption of files that have none.
        dropout: Probability that a caption is replaced by the empty one.
        is_fixed: Always the first caption of a file, for validation.
    """

    trigger: str = ""
    fallback: str = ""
    dropout: float = 0.0
    is_fixed: bool = False

    def texts(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Return the captions that a file with these ones has, at least one; it may be empty."""
        found = tuple(self._with_trigger(caption) for caption in captions or (self.fallback,))
        return found[:1] if self.is_fixed else found

    def draw(self, captions: Sequence[str], rng: np.random.Generator, drop: bool) -> str:
        """Draw a caption of a file with these ones.

        Args:
            captions: Of the file; may be empty.
            rng: Takes two numbers from it, whatever comes out, so that what follows does not depend on that.
            drop: Whether the caption may be dropped.
        """
        texts = self.texts(captions)
        dropped, place = rng.random() < self.dropout, int(rng.random() * len(texts))
        return "" if drop and dropped else texts[place]

    def every(self, files: Iterable[Sequence[str]]) -> list[str]:
        """Return all captions that may be drawn of files with such captions, sorted, each once."""
        found = {text for captions in files for text in self.texts(captions)}
        return sorted(found | ({""} if self.dropout else set()))

    def _with_trigger(self, caption: str) -> str:
        """Put the trigger before a caption, unless it is there as whole words, written the same way."""
        if not self.trigger or re.search(rf"(?<!\w){re.escape(self.trigger)}(?!\w)", caption):
            return caption
        return f"{self.trigger} {caption}".strip()
