"""Find words of a prompt that a model was never trained on.

A model with a small vocabulary has a `words.txt` beside its `model_index.json`: all words of its training captions,
one a line, in lower case. A prompt with other words still gives an image, which is why they are reported.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub import try_to_load_from_cache

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

WORDS_FILE = "words.txt"
MAX_BYTES = 4 * 2**20
MAX_NAMED = 12
"""Unknown words that a message names; the rest are counted."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|[^\w\s]")


def split_words(text: str) -> tuple[str, ...]:
    """Split a text into words in lower case.

    Args:
        text: any text; hyphens separate words, apostrophes don't.

    Returns:
        The words in their order, and pictographs such as emoji, each as a word; no other punctuation.
    """
    found = _WORD.findall(unicodedata.normalize("NFC", text).lower().replace("\u2019", "'"))
    return tuple(word for word in found if word[0].isalnum() or unicodedata.category(word[0]) == "So")


def unknown_words(text: str, known: frozenset[str] | None) -> tuple[str, ...]:
    """Return the words of a text that are not known, each once, in their order; none if `known` is None."""
    return () if known is None else tuple(dict.fromkeys(word for word in split_words(text) if word not in known))


def read_words(folder: str | os.PathLike) -> frozenset[str] | None:
    """Read the `words.txt` of a model's folder.

    Args:
        folder: of the pipeline, with its `model_index.json`.

    Returns:
        The words; None for a model without the file, whose vocabulary is open.

    Raises:
        ValueError: the file is too large, empty, or no UTF-8 text.
    """
    file = Path(folder) / WORDS_FILE
    return _read(file) if file.is_file() else None


def write_words(words: Iterable[str], folder: str | os.PathLike) -> Path:
    """Write the `words.txt` of a model's folder, sorted; the folder is created if it is missing."""
    file = Path(folder) / WORDS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{word}\n" for word in sorted(set(words))), encoding="utf-8")
    return file


def describe_unknown(words: Sequence[str]) -> str:
    """Say in one sentence that a model does not know these words; "" for none."""
    if not words:
        return ""
    more = f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else ""
    named = ", ".join(repr(word[:40]) for word in words[:MAX_NAMED])
    return f"The model was not trained on the words {named}{more}: the image may lack what they ask for."


class KnownWordsMixin:
    """Lets a pipeline load, save and use the words of its `words.txt`.

    Attributes:
        known_words: all words of the training captions; None for a model with an open vocabulary.
    """

    known_words: frozenset[str] | None = None

    def unknown_words(self, prompt: str | Sequence[str] | None) -> tuple[str, ...]:
        """Return the words of prompts that the model was not trained on, each once.

        Args:
            prompt: one prompt, several, or None.

        Returns:
            The words in lower case, in their order; none for a model with an open vocabulary.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt or []
        return unknown_words(" ".join(prompts), self.known_words)

    def warn_of_unknown_words(self, *prompts: object) -> None:
        """Name in one logged warning the words that the model was not trained on; adapters may have taught it others.

        Args:
            *prompts: each a text, several, or None; what is of another type is ignored, because it is refused later.
        """
        if getattr(getattr(self, "transformer", None), "peft_config", None):
            return
        sides = [[side] if isinstance(side, str) else side for side in prompts]
        texts = [one for side in sides if isinstance(side, list | tuple) for one in side if isinstance(one, str)]
        if said := describe_unknown(self.unknown_words(texts)):
            logger.warning(said)

    @classmethod
    def read_checked(cls, source: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load the pipeline, see `TesseraPipeline.read_checked`, and its `words.txt` where it has one."""
        pipe = super().read_checked(source, **kwargs)  # type: ignore[misc]
        pipe.known_words = _stored_words(source, kwargs)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """Make a pipeline of the components of another one, as in diffusers; it knows the same words."""
        pipe = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        pipe.known_words = getattr(pipeline, "known_words", None)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as in diffusers, and its words beside it."""
        if self.known_words is not None:  # first, because saving may end with an upload of the folder
            write_words(self.known_words, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def _stored_words(source: str | os.PathLike, options: dict[str, Any]) -> frozenset[str] | None:
    """Read the words of a folder or of a Hub repository in the local cache."""
    if os.path.isdir(source):
        return read_words(source)
    cached = try_to_load_from_cache(
        os.fspath(source), WORDS_FILE, cache_dir=options.get("cache_dir"), revision=options.get("revision")
    )
    return _read(Path(cached)) if isinstance(cached, str) else None


def _read(file: Path) -> frozenset[str]:
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{file.name} has {size} bytes, more than {MAX_BYTES}: it lists one word a line.")
    try:
        words = frozenset(word for line in file.read_text(encoding="utf-8").splitlines() for word in split_words(line))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is no UTF-8 text: it lists one word a line.") from error
    if not words:
        raise ValueError(f"{file.name} lists no word: write one a line, or delete the file of an open vocabulary.")
    return words
