"""`guidance_scale` for pipelines of diffusers that hold it in a guider, a component, and whose call takes none."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from copy import copy
from functools import cache, wraps
from typing import Any, TypeVar

from diffusers import DiffusionPipeline

GUIDERS = ("guider", "guider_2", "ocr_guider")
"""Components that hold the guidance scale of pipelines whose call takes none."""

Pipe = TypeVar("Pipe")


def guiders_of(pipe: Any) -> dict[str, Any]:
    """Return the components of a pipeline that hold a guidance scale, by name."""
    found = {name: getattr(pipe, name, None) for name in GUIDERS}
    return {name: one for name, one in found.items() if "guidance_scale" in (getattr(one, "config", None) or ())}


def guider_scale(pipe: Any) -> float | None:
    """Return the guidance scale of a pipeline's guider, 1 for one that is off; None without a guider."""
    first = next(iter(guiders_of(pipe).values()), None)
    if first is None:
        return None
    return float(first.config["guidance_scale"]) if first.config.get("enabled", True) else 1.0


def scaled_guider(guider: Any, scale: float) -> Any:
    """Return a copy of a guider for one call.

    Args:
        guider: stays as it is.
        scale: what it guides by; what is no more than its neutral value turns guidance off.
    """
    other = copy(guider)  # `guider.new` logs a warning at each call
    neutral = 0.0 if getattr(guider, "use_original_formulation", False) else 1.0
    other.guidance_scale = max(float(scale), neutral)
    if scale > neutral:
        other.enable()  # it is off in distilled models
    return other


@contextmanager
def guided_by(pipe: Any, scale: float | None) -> Generator[None]:
    """Have the guiders of a pipeline guide by a scale for a time; None is their own."""
    before = {} if scale is None else guiders_of(pipe)
    try:
        for name, guider in before.items():
            setattr(pipe, name, scaled_guider(guider, scale or 0.0))
        yield
    finally:
        for name, guider in before.items():
            setattr(pipe, name, guider)


def guided_call(pipe: Pipe) -> Pipe:
    """Return a pipeline whose call takes `guidance_scale`.

    Args:
        pipe: any pipeline.

    Returns:
        The same, unless it is one of diffusers with a guider and no such argument: then an object that shares all its
        attributes, of a class of the same name that is derived from its class. Components that are set on one are set
        on the other, and it saves what diffusers loads.

    Example:
        >>> pipe = guided_call(diffusers.HunyuanVideo15Pipeline.from_pretrained(folder))
        >>> pipe("a red apple", guidance_scale=4.0)
    """
    is_standard = isinstance(pipe, DiffusionPipeline)
    if not is_standard or not guiders_of(pipe) or "guidance_scale" in inspect.signature(type(pipe).__call__).parameters:
        return pipe
    view: Any = object.__new__(_guided_class(type(pipe)))
    object.__setattr__(view, "__dict__", vars(pipe))
    return view


@cache
def _guided_class(kind: type) -> type:
    """Derive a class whose call takes `guidance_scale`, behind the arguments that it has."""
    plain: Any = getattr(kind, "__call__")  # noqa: B004, B009  of the class, to be called with an instance

    @wraps(plain)
    def call(self: Any, *args: Any, guidance_scale: float | None = None, **kwargs: Any) -> Any:
        with guided_by(self, guidance_scale):
            return plain(self, *args, **kwargs)

    signature = inspect.signature(plain)
    added = inspect.Parameter("guidance_scale", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="float | None")
    setattr(call, "__signature__", signature.replace(parameters=[*signature.parameters.values(), added]))  # noqa: B010
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**names, "__call__": call})
