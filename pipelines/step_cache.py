"""Parse step caches given as text, e.g. `budget=0.35` or `fbcache:threshold=0.1`.

A built-in model has its profile beside its weights; of any other a profile is calibrated once and kept in a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit.runtime.hooks import Attachment
from sampling.step_cache import PRESETS, Profile, StepCache

PROFILE_FILE = "step_cache.safetensors"
"""Name of the profile in a model's folder."""


def parse_cache(text: str) -> tuple[str, dict[str, Any]]:
    """Read the name and parameters of a step cache.

    Args:
        text: `NAME`, `NAME:KEY=VALUE,KEY=VALUE`, or `budget=NOISE_FRACTION` (and more parameters behind commas).

    Returns:
        The preset's name and its parameters; values are numbers, true, false, null or words.

    Raises:
        ValueError: an unknown name, or text of another form.
    """
    name, _, rest = text.strip().partition(":")
    if "=" in name:  # budget=0.35
        name, rest = "budget", text.strip()
    if name not in PRESETS:
        raise ValueError(
            f"step cache {text!r} is not understood: write budget=0.35, or one of {', '.join(PRESETS)} with parameters "
            "as in fbcache:threshold=0.1"
        )
    params = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{part!r} in step cache {text!r} is not understood: write KEY=VALUE")
        params[key.strip()] = _value(value.strip())
    return name, params


def _value(text: str) -> Any:
    """Parse a number, true, false or null, else return the text itself (names and files)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def make_cache(pipeline: Any, text: str) -> StepCache:
    """Make a step cache for a pipeline.

    Args:
        pipeline: that it is for; its folder may hold a profile.
        text: see `parse_cache`.

    Raises:
        ValueError: the text is not understood, or the model has no profile.
        FileNotFoundError: the profile that is named does not exist.
    """
    name, params = parse_cache(text)
    if name == "budget" and params.get("profile") is None:
        params["profile"] = find_profile(pipeline)
    return StepCache.preset(name, **params)


def find_profile(pipeline: Any) -> Profile:
    """Load the profile in the folder of a pipeline's model.

    Raises:
        ValueError: there is none.
    """
    folder = getattr(pipeline, "name_or_path", None) or ""
    path = Path(folder) / PROFILE_FILE
    if not folder or not path.is_file():
        raise ValueError(
            f"the model {folder or type(pipeline).__name__} has no {PROFILE_FILE}, so its best steps are not known: "
            "make one with sampling.step_cache.calibrate_budget(pipeline, prompts).save(FILE) and name it as in "
            "budget=0.35,profile=FILE, or use a cache without a profile, such as fbcache:threshold=0.1"
        )
    return Profile.load(path)


def attach_cache(pipeline: Any, text: str) -> Attachment:
    """Put a step cache on a pipeline; it is also a context manager that takes it off.

    Args:
        pipeline: of diffusers or ours.
        text: see `parse_cache`.

    Returns:
        The attachment; `report()["strip"]` tells which steps were computed.

    Raises:
        ValueError: see `make_cache`.
        AttachError: another cache is on the pipeline.
    """
    return make_cache(pipeline, text).attach(pipeline)
