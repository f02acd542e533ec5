"""The names of what a model can draw and all words it was trained on, when it ships them."""

from __future__ import annotations

from pathlib import Path

MAX_BYTES = 256 * 1024
MAX_WORDS = 5_000


def read_vocabulary(source: str) -> list[str]:
    """Read a model's `vocabulary.txt`.

    Args:
        source: built-in name, folder or hub id.

    Returns:
        One name per line of the file, in its order; empty for a model without one.
    """
    file = _folder(source) / "vocabulary.txt"
    if not file.is_file():
        return []
    text = file.read_bytes()[:MAX_BYTES].decode("utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()][:MAX_WORDS]


def unknown_words(source: str, prompt: str) -> tuple[str, ...]:
    """Return the words of a prompt that a model was not trained on, without loading the model.

    Args:
        source: built-in name, folder or hub id.
        prompt: any text.

    Returns:
        The words in lower case, each once, in their order; none for a model without a `words.txt`, whose vocabulary is
        open, and for a hub id.

    Raises:
        ValueError: the file is too large, empty, or no UTF-8 text.
    """
    from pipelines.inputs import words

    return words.unknown_words(prompt, words.read_words(_folder(source)))


def _folder(source: str) -> Path:
    from pipelines.loading.load import PRETRAINED, builtin_models  # imports diffusers, which takes seconds

    return PRETRAINED / source if source in builtin_models() else Path(source)
