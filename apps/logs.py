"""Logging of a server: warnings to the terminal, without what people have asked for."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

LIBRARIES = ("diffusers", "transformers")
"""Packages whose loggers write by themselves."""
PROMPT_WORDS = "pipelines.words"
"""Logger of warnings that name words of prompts."""

UNKNOWN_WORDS = "pipelines.words"
"""Logger of what a model does not know of a prompt."""


class PromptFilter(logging.Filter):
    """Takes prompts out of what libraries log about texts that are too long for a model."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a record through, changed if it quotes a prompt; not one that is about the words of a prompt."""
        if "input was truncated" in record.getMessage():
            record.msg, record.args = "A prompt was longer than the model reads; its end was left out.", ()
        # The one who asked is told which words: the image carries a note.
        return record.name != UNKNOWN_WORDS


class IncompleteFilter(logging.Filter):
    """Drops what uvicorn says of answers that the server ended on purpose, such as those to readers that stopped."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything else through."""
        return "without completing response" not in record.getMessage()


def set_up() -> None:
    """Send warnings to the terminal; called by commands that serve, once."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    handler.addFilter(PromptFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(name)s: %(message)s")
    logging.getLogger(PROMPT_WORDS).setLevel(logging.ERROR)  # its warnings quote prompts; images carry them as notes
    logging.getLogger("uvicorn.error").addFilter(IncompleteFilter())


def hide_prompts() -> None:
    """Take prompts out of what libraries that were imported meanwhile log by themselves."""
    for name in LIBRARIES:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(one, PromptFilter) for one in handler.filters):
                handler.addFilter(PromptFilter())
