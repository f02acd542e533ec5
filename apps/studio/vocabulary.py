"""The list of words that a model was trained on, when it ships one."""

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


def _folder(source: str) -> Path:
    from pipelines.builtin import PRETRAINED, builtin_models  # imports diffusers, which takes seconds

    return PRETRAINED / source if source in builtin_models() else Path(source)
