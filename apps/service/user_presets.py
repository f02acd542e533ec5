"""Presets that users save: named settings like the built-in ones, one file a user in the folder of the server's state.

A preset holds no prompt, no seed and no image. What comes from a page or a file is checked against the same schema as
the built-in presets, and by names and sizes; a preset never names images, which belong to somebody.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import unicodedata
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from apps.service.named_settings import Preset, load_presets
from apps.service.option_values import IMAGE_FIELDS
from apps.service.request_error import RequestError
from apps.service.validation import explain_fields

FOLDER = "presets"
"""In the folder of the server's state."""
MAX_PRESETS = 100
"""Of one user."""
MAX_NAME = 60
"""Characters."""
MAX_BYTES = 256 * 1_024
"""Of a file of presets."""
BELONGING = frozenset({*IMAGE_FIELDS, "expand"})
"""Settings that go with an image, which presets don't hold."""


class UserPresets:
    """The presets of all users of a server.

    Args:
        folder: receives the files, created when the first preset is saved; None keeps presets in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._kept: dict[str, dict[str, Preset]] = {}

    def of(self, owner: str) -> dict[str, Preset]:
        """Return a user's presets by name, sorted.

        Raises:
            RequestError: their file was damaged.
        """
        with self._lock:
            return self._read(owner)

    def save(self, owner: str, name: str, values: Mapping[str, Any]) -> str:
        """Save a preset; one of that name is replaced.

        Args:
            owner: whose it is.
            name: of the preset.
            values: fields of a request; those that presets don't hold are left out.

        Returns:
            The name as it is kept.

        Raises:
            RequestError: the name is empty, too long or that of a built-in preset, or there are too many.
            OSError: it can't be written.
        """
        held = {key: value for key, value in values.items() if key in Preset.model_fields and key not in BELONGING}
        kept = _checked_name(name)
        preset = _checked({kept: {key: value for key, value in held.items() if value is not None}})[kept]
        with self._lock:
            self._write(owner, {**self._read(owner), kept: preset})
        return kept

    def delete(self, owner: str, name: str) -> None:
        """Delete a preset.

        Raises:
            RequestError: the user has none of that name.
            OSError: it can't be written.
        """
        with self._lock:
            found = self._read(owner)
            if name not in found:
                names = ", ".join(found) or "none"
                raise RequestError(
                    "preset.unknown",
                    f"preset: you have saved none called {name[:MAX_NAME]!r}; yours are {names}.",
                    value=name,
                    choices=names,
                )
            del found[name]
            self._write(owner, found)

    def export(self, owner: str) -> str:
        """Return a user's presets as JSON, in the form of the built-in ones."""
        return write_presets(self.of(owner))

    def take_in(self, owner: str, data: bytes) -> tuple[str, ...]:
        """Add the presets of a file, which replace those of the same names.

        Args:
            owner: whose they become.
            data: of a JSON file, name -> settings.

        Returns:
            Their names.

        Raises:
            RequestError: too large, no such JSON, a setting out of range, or too many presets.
            OSError: they can't be written.
        """
        added = read_presets(data)
        with self._lock:
            self._write(owner, {**self._read(owner), **added})
        return tuple(added)

    # ---------------------------------------------------------------------- files

    def _file(self, owner: str) -> Path | None:
        """Return the file of a user, named by a hash: names of users may hold anything."""
        return (
            None if self._folder is None else self._folder / f"{hashlib.sha256(owner.encode()).hexdigest()[:32]}.json"
        )

    def _read(self, owner: str) -> dict[str, Preset]:
        file = self._file(owner)
        if file is None:
            return dict(self._kept.get(owner, {}))
        return read_presets(file.read_bytes()) if file.is_file() else {}

    def _write(self, owner: str, presets: dict[str, Preset]) -> None:
        if len(presets) > MAX_PRESETS:
            raise RequestError(
                "preset.many",
                f"preset: {len(presets)} would be kept, and at most {MAX_PRESETS} are; delete some.",
                value=len(presets),
                most=MAX_PRESETS,
            )
        ordered = dict(sorted(presets.items()))
        file = self._file(owner)
        if file is None:
            self._kept[owner] = ordered
            return
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = file.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
                out.write(write_presets(ordered))
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def write_presets(presets: Mapping[str, Preset]) -> str:
    """Write presets as JSON, in the form of `presets/presets.json`."""
    rows = {name: one.model_dump(mode="json", include=set(one.values())) for name, one in presets.items()}
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def read_presets(data: bytes) -> dict[str, Preset]:
    """Read presets as `write_presets` wrote them, or a file of any origin in their place.

    Raises:
        RequestError: too large, no such JSON, a name or a setting that isn't accepted, or too many.
    """
    if len(data) > MAX_BYTES:
        raise RequestError(
            "preset.bytes",
            f"preset: the file has {len(data)} bytes, and at most {MAX_BYTES} are read; split it.",
            value=len(data),
            most=MAX_BYTES,
        )
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _no_presets() from error
    if not isinstance(rows, dict) or len(rows) > MAX_PRESETS:
        raise _no_presets()
    return _checked({_checked_name(name): row for name, row in rows.items()})


def _no_presets() -> RequestError:
    return RequestError(
        "preset.file",
        f"preset: the file is no JSON object of at most {MAX_PRESETS} presets, name -> settings; export some to see "
        "the form.",
        most=MAX_PRESETS,
    )


def _checked(rows: Mapping[str, Any]) -> dict[str, Preset]:
    """Check settings against the schema of presets."""
    checked: dict[str, Preset] = {}
    for name, row in rows.items():
        belonging = sorted(BELONGING & set(row)) if isinstance(row, dict) else []
        if belonging:
            names = ", ".join(belonging)
            raise RequestError(
                "preset.image", f"preset: {name!r} holds {names}, which go with an image; leave them out.", names=names
            )
        try:
            checked[name] = Preset.model_validate(row)
        except ValidationError as error:
            reason = explain_fields(error, Preset)
            message = f"preset: {name!r} holds what isn't accepted: {reason}"
            raise RequestError("preset.values", message, reason=reason) from error
    return checked


def _checked_name(name: object) -> str:
    """Return the name of a preset, tidied up.

    Raises:
        RequestError: it is empty, too long, has control characters, or is that of a built-in one.
    """
    kept = " ".join(unicodedata.normalize("NFC", name).split()) if isinstance(name, str) else ""
    is_printable = all(unicodedata.category(one)[0] != "C" for one in kept)
    if not kept or len(kept) > MAX_NAME or not is_printable:
        raise RequestError(
            "preset.name", f"preset: give it a name of 1 to {MAX_NAME} printable characters.", most=MAX_NAME
        )
    if kept in load_presets():
        raise RequestError(
            "preset.taken", f"preset: {kept!r} is one of the built-in presets; choose another name.", value=kept
        )
    return kept
