"""One clear line for whatever a library raises while it reads a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pipelines.memory import is_out_of_memory

LONGEST = 300


@contextmanager
def clear_loading_errors(source: str | Path) -> Generator[None]:
    """Turn what libraries raise while they read a checkpoint into one line that names it; the cause is kept.

    Errors that are clear already pass: those of one line that say what to do are ours or the Hub's.

    Raises:
        ValueError: for all that is neither an OSError, a lack of memory nor a missing package.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        is_clear = isinstance(error, OSError | ValueError) and "\n" not in str(error).strip() and str(error).strip()
        if is_clear or is_out_of_memory(error):
            raise
        kind = type(error) if type(error) in (OSError, FileNotFoundError, PermissionError) else ValueError
        raise kind(
            f"{source} can't be used: {one_line(error)}. A file is damaged or of another model; fetch it again."
        ) from error


def one_line(error: BaseException) -> str:
    """Say an error of a library in one line, with its kind where the text alone says little."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    text = re.split(r"Exception raised from |\(most recent call first\)", text)[0].strip()
    shown = f"{text[:LONGEST]}..." if len(text) > LONGEST else text
    return (
        shown.rstrip(".") if type(error) is ValueError and shown else f"{type(error).__name__}: {shown}".rstrip(".: ")
    )
