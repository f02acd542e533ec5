"""Load the pipeline of a command: its name and device checked first, and without the bars of libraries."""

from __future__ import annotations

from typing import Any

from apps.service.devices import resolve_device, resolve_dtype
from apps.service.logs import no_loading_bars
from apps.service.model_pool import check_sources
from apps.service.usage import checking
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
