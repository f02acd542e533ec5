"""Clear one-line errors for what libraries raise while they read a checkpoint."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from pipelines.loading.memory import is_out_of_memory

LONGEST = 300
"""Characters of a library's message that are shown."""

OUR_PACKAGES = ("dit", "sampling", "pipelines", "apps")


@contextmanager
def clear_loading_errors(source: str | Path, culprit: Callable[[], str | Path | None] | None = None) -> Generator[None]:
    """Turn what libraries raise while they read a checkpoint into one line that names it; the cause is kept.

    Errors of ours are clear already, and so are those of files that can't be opened.

    Args:
        source: what is read, for the message.
        culprit: finds out which part of it is to blame, if that can be known.

    Raises:
        ValueError: for all that is neither an OSError, a lack of memory nor a missing package.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        is_short = bool(str(error).strip()) and "\n" not in str(error).strip()
        is_clear = is_short and (isinstance(error, OSError) or (isinstance(error, ValueError) and _is_ours(error)))
        if is_clear or is_out_of_memory(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        where = (culprit and culprit()) or source
        raise kind(
            f"{where} can't be used: {one_line(error)}. A file is damaged or of another model; fetch it again."
        ) from error


def _is_ours(error: BaseException) -> bool:
    """Return whether an error was raised by code of ours rather than by a library that it called."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").split(".")[0] in OUR_PACKAGES


def one_line(error: BaseException) -> str:
    """Say an error of a library in one line, with its kind where the text alone says little."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    text = re.split(r"Exception raised from |\(most recent call first\)", text)[0].strip()
    shown = f"{text[:LONGEST]}..." if len(text) > LONGEST else text
    return (
        shown.rstrip(".") if type(error) is ValueError and shown else f"{type(error).__name__}: {shown}".rstrip(".: ")
    )
