"""The choice of LoRA files: a row for each that may be on the model at once, shown when the one before is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from apps.service import limits
from apps.service.option_values import Lora
from apps.studio import fields
from apps.studio.page_values import Values, filled
from apps.studio.stage import Changes
from apps.studio.strings import Strings

ENDINGS = ("", *(f"_{number}" for number in range(2, limits.MAX_LORAS + 1)))
NAMES = tuple(f"lora{ending}" for ending in ENDINGS)
"""Parts that hold the name of a file, "" for none."""
SCALES = tuple(f"lora_scale{ending}" for ending in ENDINGS)
"""Parts that hold its weight."""
ROWS = tuple(f"lora_row{ending}" for ending in ENDINGS)


def build(offered: Sequence[str], words: Strings) -> dict[str, Any]:
    """Build the rows; the first is shown if there is anything to choose."""
    parts: dict[str, Any] = {}
    choices = [(words("lora.none"), ""), *offered]
    for number, (name, scale, row) in enumerate(zip(NAMES, SCALES, ROWS, strict=True), 1):
        labels = [words(key) if number == 1 else f"{words(key)} {number}" for key in ("loras", "loras.scale")]
        ids = [one.replace("_", "-") for one in (name, scale, row)]
        with gr.Row(elem_id=ids[2], visible=bool(offered) and number == 1) as parts[row]:
            parts[name] = fields.Dropdown(choices, value="", label=labels[0], filterable=False, elem_id=ids[0])
            parts[scale] = fields.Slider(-2, 2, 1, step=0.05, label=labels[1], elem_id=ids[1])
    return parts


def offer(names: Sequence[str], words: Strings) -> Changes:
    """Offer files in all rows; without any there are no rows."""
    choices = [(words("lora.none"), ""), *names]
    hidden = {} if names else dict.fromkeys(ROWS[1:], gr.update(visible=False))
    return {
        **{name: gr.update(choices=choices) for name in NAMES},
        ROWS[0]: gr.update(visible=bool(names)),
        **hidden,
    }


def unfold(*chosen: str) -> Changes:
    """Show each row that is used or follows one that is.

    Args:
        *chosen: what the rows hold.
    """
    used = [bool(name) for name in chosen]
    return {row: gr.update(visible=used[i] or used[i - 1]) for i, row in enumerate(ROWS) if i}


def read(values: Values) -> list[dict[str, Any]]:
    """Return what the rows ask for, as `loras` of a request has it."""
    rows = zip(NAMES, SCALES, strict=True)
    return [{"name": values[name], "scale": filled(values[scale])} for name, scale in rows if values[name]]


def show(loras: Sequence[Lora]) -> dict[str, Any]:
    """Return what the rows hold for LoRAs; those that stay free hold none."""
    free = len(NAMES) - len(loras)
    names = [one.name for one in loras] + [""] * free
    scales = [one.scale for one in loras] + [1.0] * free
    return {**dict(zip(NAMES, names, strict=True)), **dict(zip(SCALES, scales, strict=True))}
