"""The data files of step caches: defaults of presets and what papers published for models."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def data(name: str) -> Any:
    """Read one of the data files.

    Args:
        name: of the file, without its ending.
    """
    return json.loads((files("sampling.step_cache") / "data" / f"{name}.json").read_text(encoding="utf-8"))
