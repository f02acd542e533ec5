"""Wrong usage of the command line, as distinct from work that failed: exit code 2 instead of 1."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


class UsageError(ValueError):
    """What was asked for can't be: an unknown name, a value out of range, options that exclude each other."""


@contextmanager
def checking(kind: type[Exception] = ValueError, *others: type[Exception]) -> Generator[None]:
    """Run checks of what was asked for: what they raise becomes a `UsageError`.

    Args:
        kind: of error that means wrong usage here.
        *others: kinds that do too.

    Raises:
        UsageError: one of the kinds was raised; a `UsageError` passes as it is.
    """
    try:
        yield
    except UsageError:
        raise
    except (kind, *others) as error:
        raise UsageError(str(error)) from error
