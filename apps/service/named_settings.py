"""Presets: named sets of settings, from a JSON file that anyone can edit; what a request says itself goes first."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from apps.service.options import DenoisingOptions, NextScaleOptions, SharedOptions
from apps.service.request_error import RequestError

PRESETS = Path(__file__).parent / "presets" / "presets.json"


class Preset(DenoisingOptions, NextScaleOptions, SharedOptions):
    """One set of settings; what is None, or an empty list, stays as it is."""

    def values(self) -> dict[str, Any]:
        """Return the fields of a request that it sets."""
        return {name: value for name in Preset.model_fields if (value := getattr(self, name)) not in (None, ())}


@functools.cache
def load_presets(file: Path = PRESETS) -> dict[str, Preset]:
    """Read the presets.

    Args:
        file: JSON object, name -> preset.

    Raises:
        ValueError: not such a file.
    """
    found = TypeAdapter(dict[str, Preset]).validate_python(json.loads(file.read_text(encoding="utf-8")))
    return dict(found)


def unknown_preset(name: str, own: Mapping[str, Preset] | None = None) -> RequestError:
    """Return the error of a name that no preset has, neither a built-in one nor one of the user's own."""
    names = ", ".join([*load_presets(), *(own or {})])
    return RequestError(
        "choice", f"There is no such preset; choose among {names}.", field="preset", value=name, choices=names
    )


def preset_values(name: str, fields: Collection[str], own: Mapping[str, Preset] | None = None) -> dict[str, Any]:
    """Return what a preset sets in a request.

    Args:
        name: of the preset.
        fields: that the request has.
        own: presets of the user, beside the built-in ones.

    Raises:
        ValueError: no such preset, or it sets what the request has no field for.
    """
    presets = {**(own or {}), **load_presets()}
    if name not in presets:
        raise unknown_preset(name, own)
    values = presets[name].values()
    missing = sorted(set(values) - set(fields))
    if missing:
        raise RequestError(
            "preset",
            f"The preset {name!r} sets {', '.join(missing)}, which this task doesn't have; leave it out.",
            value=name,
            names=", ".join(missing),
        )
    return values
