"""The settings of a grid, written into the PNG file of its sheet and read back as untrusted text.

Beside `apps.service.metadata`, because a sheet is no image that a model generated: its own text chunk holds the three
axes and the request that they vary.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Literal, Self

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from apps.service import limits, xmp
from apps.service.grid import Axis, Cell, plan, read_axis
from apps.service.metadata import MetadataError, mark_of
from apps.service.provenance import finish_file, packet
from apps.service.requests import Request

CHUNK = "tessera-grid"
"""Keyword of the text chunk."""


class GridSettings(BaseModel):
    """Everything needed to generate a grid again.

    Attributes:
        schema_version: of this record.
        axes: x, y and z.
        request: what they vary; it has a seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    axes: tuple[Axis, Axis, Axis]
    request: Request

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        for axis in self.axes:
            read_axis(axis.name, ", ".join(axis.values))
        if self.request.seed is None:
            raise ValueError("The request of a grid has no seed; give it one, so that only the axes differ.")
        self.cells()
        return self

    def cells(self) -> list[Cell]:
        """Return the cells, row by row."""
        return plan(self.request, self.axes)


def save_sheet(image: Image.Image, path: Path, settings: GridSettings, *, keep_settings: bool = True) -> Path:
    """Write a sheet with its mark and the settings of its grid; the file appears complete or not at all.

    Args:
        image: the sheet.
        path: the PNG file to write; an existing one is replaced.
        settings: what generates the grid again.
        keep_settings: write them too, and not only that the sheet was generated.

    Returns:
        `path`.
    """
    text, mark = PngImagePlugin.PngInfo(), mark_of(settings.request)
    if keep_settings:
        text.add_itxt(CHUNK, settings.model_dump_json())
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with partial.open("xb") as file:
            image.save(file, format="PNG", **xmp.pillow_options("PNG", packet(mark), text))
        finish_file(partial, "PNG", mark)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_sheet(path: Path) -> GridSettings | None:
    """Read the settings of a grid from a file of any origin.

    Args:
        path: the file.

    Returns:
        The checked settings; None if the file is no sheet of a grid.

    Raises:
        MetadataError: it is one, but its settings are too long or outside the schema.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(CHUNK)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ):  # no PNG: `read_picture` says what is wrong
        return None
    if not isinstance(text, str):
        return None
    size = len(text.encode("utf-8", errors="replace"))
    if size > limits.MAX_METADATA_BYTES:
        raise MetadataError(
            "settings.bytes",
            f"The settings take {size} bytes; at most {limits.MAX_METADATA_BYTES} are read.",
            value=size,
            most=limits.MAX_METADATA_BYTES,
        )
    try:
        return GridSettings.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        raise MetadataError(
            "settings.grid", f"The settings of the grid in {path.name!r} don't pass the checks.", file=path.name
        ) from error
