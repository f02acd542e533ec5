"""The controls that follow from the options: how they look, and their way to a request and back."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import gradio as gr

from apps.service import limits
from apps.service.declared import DeclaredOption
from apps.service.requests import OPTIONS
from apps.studio import fields
from apps.studio.page_values import Values, filled
from apps.studio.strings import Strings

Parts = dict[str, Any]
"""Components by name."""

CONTROLS = {name: one for name, one in OPTIONS.items() if one.option.control is not None}
"""Options with a control of the same name on the page."""
HELD = {
    "prompt": "prompt", "model": "model", "width": "width", "height": "height", "seed": "seed", "seed_mode": "seed",
    "preset": "preset", "step_cache": "step_cache", "cache_amount": "step_cache", "label": "label",
    "scale_label": "label", "inpaint_label": "label", "repaint": "strength", "grow_left": "expand",
    "grow_top": "expand", "grow_right": "expand", "grow_bottom": "expand",
}  # fmt: skip
"""Controls of another making -> option that they hold, or a part of it."""
FLAG = re.compile(r"^(?:With --[a-z-]+: |Next-scale models, |Next-scale models: )")
"""Beginning of a help that a page doesn't need, because the controls that it is about stand together."""
SHARED = ("sampling", "count", "advanced")
"""Places whose controls all tabs have."""


def build(name: str, words: Strings, option: DeclaredOption | None = None, **more: Any) -> Any:
    """Make a control.

    Args:
        name: of the control.
        words: of the page.
        option: what it sets; None is the option of that name.
        **more: arguments of Gradio's component that differ, such as choices.
    """
    one = CONTROLS[name] if option is None else option
    control = one.option.control
    if control is None:
        raise ValueError(f"The option {one.name!r} has no control; declare one in apps/service/options.py.")
    common = {"label": words(one.label), "elem_id": name.replace("_", "-"), **more}
    low: Any = one.low if control.low is None else control.low
    high: Any = one.high if control.high is None else control.high
    match control.kind:
        case "slider":
            return fields.Slider(low, high, control.start, step=control.step, **common)
        case "number":
            precision = 0 if one.type is int else None
            return fields.Number(control.start, precision=precision, minimum=low, maximum=high, **common)
        case "checkbox":
            return gr.Checkbox(control.start, **common)
        case "text":
            hint = words(f"{name}.hint")
            return gr.Textbox(control.start, placeholder=hint, max_length=limits.MAX_PROMPT_CHARS, **common)
        case "radio":
            return fields.Radio(**{"choices": [*one.choices], "value": control.start, **common})
    keys = {f"{name}.{value}": value for value in control.choices or one.choices}
    choices = [(words(key), value) if key in words else value for key, value in keys.items()]
    offered = [(words(_none(name, words)), ""), *choices] if control.off == "" else choices
    return fields.Dropdown(**{"choices": offered, "value": control.start, "filterable": False, **common})


def _none(name: str, words: Strings) -> str:
    """Return the key of what a choice is called that isn't made."""
    return f"{name}.none" if f"{name}.none" in words else "machine.usual"


def help_of(name: str, words: Strings) -> str:
    """Return the help of an option as the page shows it: that of its declaration, in the language of the page.

    Args:
        name: of the option.
        words: of the page.
    """
    text = words.help(name) or FLAG.sub("", OPTIONS[name].option.help)
    return text[:1].upper() + text[1:]


def help_texts(parts: Parts, words: Strings) -> dict[str, str]:
    """Return the help of every control that holds an option, or a part of one.

    Args:
        parts: of the page; those that hold none are left out.
        words: of the page.

    Returns:
        Element of the page -> text.
    """
    held = {**{name: name for name in CONTROLS}, **HELD}
    found = {name: option for name, option in held.items() if getattr(parts.get(name), "elem_id", None)}
    return {parts[name].elem_id: help_of(option, words) for name, option in found.items()}


def lay_out(place: str, words: Strings, besides: Collection[str] = (), **more: Any) -> Parts:
    """Lay out the controls of a place in the order of their declaration, those of one row side by side.

    Args:
        place: see `apps.service.option.Control`.
        words: of the page.
        besides: names of controls that have been laid out already.
        **more: arguments of all components that differ.
    """
    rows: dict[str, list[str]] = {}
    for name, one in CONTROLS.items():
        control = one.option.control
        if control is not None and control.place == place and name not in besides:
            rows.setdefault(control.row or name, []).append(name)
    parts: Parts = {}
    for row, names in rows.items():
        if len(names) == 1:
            parts[names[0]] = build(names[0], words, **more)
        else:
            with gr.Row(elem_id=row):
                parts |= {name: build(name, words, **more) for name in names}
    for name in parts:
        _follow_needed(name, parts)
    return parts


def _follow_needed(name: str, parts: Parts) -> None:
    """Offer a control only while the option that it needs is set."""
    needed = OPTIONS[name].option.needs
    if needed not in parts:
        return

    def offer(value: object) -> Any:
        return gr.update(interactive=_is_set(needed, value))

    parts[name].interactive = _is_set(needed, parts[needed].value)
    parts[needed].change(
        offer, parts[needed], parts[name], queue=False, show_progress="hidden", api_visibility="private"
    )


def _is_set(name: str, value: object) -> bool:
    """Whether a control holds a value with which options that need it mean something."""
    return value not in (None, "", OPTIONS[name].option.idle)


# ------------------------------------------------------------------------ to a request and back


def to_fields(values: Values, places: Sequence[str]) -> dict[str, Any]:
    """Read the controls of some places.

    Args:
        values: what stands on the page.
        places: whose controls count.

    Returns:
        Field of a request -> value; None for what is not set, a text for a number that was deleted.
    """
    return {
        name: _field(name, one, values)
        for name, one in CONTROLS.items()
        if one.option.control is not None and one.option.control.place in places
    }


def _field(name: str, one: DeclaredOption, values: Values) -> Any:
    control, needs, value = one.option.control, one.option.needs, values[name]
    if needs in CONTROLS and not _is_set(needs, values[needs]):
        return None
    if control is not None and control.off is not ... and value in (control.off, None):
        return None
    if one.is_composed and isinstance(value, str):
        return one.from_text(value)
    return bool(value) if one.type is bool else filled(value)


def to_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what controls hold for fields of a request or of an image's settings; the reverse of `to_fields`.

    Args:
        found: field -> value; fields without a control of their name are left out.
    """
    shown: dict[str, Any] = {}
    for name, value in found.items():
        control = CONTROLS[name].option.control if name in CONTROLS else None
        if control is not None:
            shown[name] = (None if control.off is ... else control.off) if value is None else _as_shown(value)
    return {name: value for name, value in shown.items() if value is not None}


def _as_shown(value: Any) -> Any:
    """Write a value of several parts as the text that its control holds."""
    return type(value).text_of(value.to_dict()) if hasattr(type(value), "text_of") else value
