"""Logging of a server: warnings to the terminal, without what people have asked for."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler

LIBRARIES = ("diffusers", "transformers")
"""Packages whose loggers write by themselves."""
PROMPT_WORDS = "pipelines.inputs.words"
"""Logger of warnings that name words of prompts."""


class PromptFilter(logging.Filter):
    """Takes prompts out of what libraries log about texts that are too long for a model."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a record through, changed if it quotes a prompt; not one that is about the words of a prompt."""
        if "input was truncated" in record.getMessage():
            record.msg, record.args = "A prompt was longer than the model reads; its end was left out.", ()
        # The one who asked reads which words: the image carries a note.
        return record.name != PROMPT_WORDS


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


@contextmanager
def no_loading_bars() -> Generator[None]:
    """Keep diffusers and transformers from drawing bars while they load; what was set before is set again."""
    # Here and not above: they take seconds to import.
    import diffusers
    import transformers

    libraries = [diffusers.utils.logging, transformers.utils.logging]
    drawing = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in drawing:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in drawing:
            library.enable_progress_bar()


@contextmanager
def no_repetition() -> Generator[None]:
    """Keep out of the log what a command shows by itself: its errors and its notes."""
    levels = {"apps": logging.CRITICAL, PROMPT_WORDS: logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
