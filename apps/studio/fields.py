"""Gradio's fields without its checks of the values that come in.

Gradio refuses a number out of range or a value that is no choice with a sentence of its own, in English and without the
name of the field, and writes a trace into the server's log. Requests are checked when they are made, see
`apps.service.requests`, and what those checks find is said in the language of the page, see `apps.studio.problems`.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any, TypeVar

import gradio as gr

Field = TypeVar("Field", bound=gr.components.Component)


def _hand_on(self: gr.components.Component, payload: Any) -> Any:
    """Take a value as it came."""
    return payload


def _without_checks(base: type[Field]) -> type[Field]:
    """Return a component class that hands values on as they came, and is drawn like the one it is made of.

    A class and not a changed object, because Gradio makes an object anew when a listener updates it. Its metaclass is
    passed by: it would write a `.pyi` file beside this one.
    """
    return ABCMeta.__new__(type(base), base.__name__, (base,), {"preprocess": _hand_on})


Dropdown = _without_checks(gr.Dropdown)
Number = _without_checks(gr.Number)
Radio = _without_checks(gr.Radio)
Slider = _without_checks(gr.Slider)
