"""All accelerations as one value: apply, undo exactly, report, record.

    from pipelines.acceleration import AccelerationConfig

    with AccelerationConfig(step_cache="budget=0.35").apply(pipe) as acceleration:
        image = pipe("a red apple").images[0]
    print(acceleration.report().text())

`parts` are the values, `switch` and `on_*` apply one part each, `conflicts` says what cannot go together, `report` and
`texts` the sentences of its reports. Names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.acceleration.config import AccelerationConfig
    from pipelines.acceleration.handle import AccelerationHandle
    from pipelines.acceleration.report import AccelerationReport, PartReport, Reason
    from pipelines.acceleration.texts import AccelerationError, render

__all__ = [
    "AccelerationConfig",
    "AccelerationError",
    "AccelerationHandle",
    "AccelerationReport",
    "PartReport",
    "Reason",
    "render",
]

_HOMES = {
    "AccelerationConfig": "config",
    "AccelerationHandle": "handle",
    "AccelerationReport": "report",
    "PartReport": "report",
    "Reason": "report",
    "AccelerationError": "texts",
    "render": "texts",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"pipelines.acceleration.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
