"""What mechanisms (step caches, sparse attention, quantizers, observers) build on.

`StepContext` says which call of the network this is, `LayerContext` which attention layer computes. `Attachment` is
what a mechanism's `attach()` returns, and `families` knows the blocks and layers of each network.
`tests/runtime/attention_norms.py` is a complete mechanism to read before writing one.
Names are imported on first use, so that importing one part does not import the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit.runtime import families
    from dit.runtime.hooks import Attachment, Mechanism
    from dit.runtime.layer_context import LayerContext, current_layer, follow_layers
    from dit.runtime.step_context import StepContext, current_step, step_scope

__all__ = [
    "Attachment",
    "LayerContext",
    "Mechanism",
    "StepContext",
    "current_layer",
    "current_step",
    "families",
    "follow_layers",
    "step_scope",
]

_MODULES = {
    "Attachment": "hooks",
    "Mechanism": "hooks",
    "LayerContext": "layer_context",
    "current_layer": "layer_context",
    "follow_layers": "layer_context",
    "StepContext": "step_context",
    "current_step": "step_context",
    "step_scope": "step_context",
}


def __getattr__(name: str) -> Any:
    if name == "families":
        return import_module("dit.runtime.families")
    if name in _MODULES:
        return getattr(import_module(f"dit.runtime.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
