"""Reads the declarations of `apps.service.options`: what the fields of a request are, for all who derive from them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from apps.service.option import Option


@dataclass(frozen=True, slots=True)
class DeclaredOption:
    """An option with what its field says of values.

    Attributes:
        name: of the field.
        option: its annotation.
        type: of a value: int, float, bool, str, or a class with the parts of it.
        choices: all values of an option that has few.
        low: lowest number that is accepted; None without a bound, or for one that is not reached.
        high: highest number that is accepted.
    """

    name: str
    option: Option
    type: type[Any]
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def flag(self) -> str:
        """Name on the command line, with underscores."""
        return self.option.flag or self.name

    @property
    def label(self) -> str:
        """Key of the label in the page's strings."""
        return self.option.label or self.name

    @property
    def is_composed(self) -> bool:
        """Whether a value has several parts, which people write as one text."""
        return hasattr(self.type, "from_text")

    def from_text(self, text: str) -> Any:
        """Read a value as people type it.

        Raises:
            ValueError: it is no such value.
        """
        if self.is_composed:
            return self.type.from_text(text)
        return self.type(text) if self.type in (int, float) else text


def declared_options(*models: type[BaseModel]) -> Mapping[str, DeclaredOption]:
    """Return the options of models by the names of their fields, in the order of their declaration."""
    found: dict[str, DeclaredOption] = {}
    for model in models:
        for name, info in model.model_fields.items():
            option = next((one for one in info.metadata if isinstance(one, Option)), None)
            if option is not None:
                found.setdefault(name, _declared(name, option, info))
    return found


def _declared(name: str, option: Option, info: FieldInfo) -> DeclaredOption:
    kind, choices, bounds = _value_type(info.annotation)
    bounds = [*bounds, *info.metadata]
    low = next((one.ge for one in bounds if getattr(one, "ge", None) is not None), None)
    high = next((one.le for one in bounds if getattr(one, "le", None) is not None), None)
    return DeclaredOption(name, option, kind, choices, low, high)


def _value_type(annotation: Any) -> tuple[type[Any], tuple[str, ...], list[Any]]:
    """Return the type of a value that isn't None, its choices, and what annotations say of it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, choices, bounds = _value_type(arguments[0])
        return kind, choices, [*bounds, *arguments[1:]]
    if origin is Literal:
        return str, arguments, []
    if origin in (Union, types.UnionType):
        several = [_value_type(one) for one in arguments if one is not type(None)]
        return several[0] if len(several) == 1 else (str, (), [])
    return annotation, (), []
