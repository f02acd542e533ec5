"""What an option is, beside the type and the range of its field; `apps.service.options` declares them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """The control of an option on the page.

    Attributes:
        kind: of Gradio's component.
        place: part of the page: a tab's name, `sampling`, `count` or `advanced`.
        row: options of a place with the same row stand side by side.
        start: what it shows at first; the model's default replaces it.
        low: lowest number; the lowest that is accepted if None.
        high: highest number; the highest that is accepted if None.
        step: between two numbers.
        choices: of a `choice`, if the type of the option doesn't name them.
        off: what it shows for an option that is not set; ... if nothing stands for that.
    """

    kind: Literal["slider", "number", "choice", "radio", "checkbox", "text"]
    place: str
    row: str = ""
    start: Any = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    off: Any = ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What readers need to know of a field beside its type and range.

    Attributes:
        help: one line for `--help` and for the HTTP schema.
        panel: of `--help`; empty for a field that the command line doesn't have, or has in another form.
        flag: its name on the command line, if that isn't the name of the field.
        argument: keyword of a pipeline's call that takes it as it is; empty if none does.
        default: its value where neither the request, nor its preset, nor the model says one.
        needs: option that has to be set for this one to mean anything.
        idle: value with which options that need this one mean nothing, besides none.
        label: key of its label in the page's strings, if that isn't the name of the field.
        is_axis: whether a grid may vary it.
        control: on the page; None if the page has none, or one of its own making.
    """

    help: str
    panel: str = ""
    flag: str = ""
    argument: str = ""
    default: Any = None
    needs: str = ""
    idle: Any = None
    label: str = ""
    is_axis: bool = True
    control: Control | None = None

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Describe the field in the HTTP schema."""
        return {**handler(core_schema), "description": self.help}
