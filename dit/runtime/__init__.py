"""The ground that all mechanisms stand on.

`Coordinates` say which call of the network this is, `LayerContext` which attention layer of it computes. `Attachment`
is what every mechanism's `attach()` returns, and `families` knows where the parts of each network are.
`dit.runtime.demonstration` shows how to write a mechanism.
Names are looked up when they are used, so that importing one part does not import the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit.runtime import families
    from dit.runtime.attachment import Attachment, Mechanism
    from dit.runtime.coordinates import Coordinates, coordinates_scope, current_coordinates
    from dit.runtime.layer_context import LayerContext, current_layer, follow_layers

__all__ = [
    "Attachment",
    "Coordinates",
    "LayerContext",
    "Mechanism",
    "coordinates_scope",
    "current_coordinates",
    "current_layer",
    "families",
    "follow_layers",
]

_HOMES = {
    "Attachment": "attachment",
    "Mechanism": "attachment",
    "Coordinates": "coordinates",
    "coordinates_scope": "coordinates",
    "current_coordinates": "coordinates",
    "LayerContext": "layer_context",
    "current_layer": "layer_context",
    "follow_layers": "layer_context",
}


def __getattr__(name: str) -> Any:
    if name == "families":
        return import_module("dit.runtime.families")
    if name in _HOMES:
        return getattr(import_module(f"dit.runtime.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
