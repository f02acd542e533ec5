"""Load the pipeline of a command: its name and device checked first, and without the bars of libraries."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from apps.engine import resolve_device, resolve_dtype
from apps.shelf import check_sources
from apps.usage import checking
from pipelines import load_pipeline


def load_for_command(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """Load the pipeline that a command was asked to work with.

    Args:
        model: built-in name, folder or hub id.
        device: None or `auto` is the best there is.
        dtype: None or `auto` suits the device.

    Returns:
        The pipeline; it draws no bars.

    Raises:
        UsageError: no such model, device or number format.
    """
    with checking():
        place = resolve_device(device or "auto")
        resolve_dtype(dtype or "auto", place)
    check_sources([model])
    with no_loading_bars(), checking(ValueError, FileNotFoundError):
        pipe: Any = load_pipeline(model, device=place, dtype=None if dtype == "auto" else dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
