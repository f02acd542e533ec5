"""Default call arguments of one pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

_ATTRIBUTE = "_call_defaults"

Call = TypeVar("Call", bound=Callable[..., Any])


def takes_call_defaults(call: Call) -> Call:
    """Have the `__call__` of a pipeline read `call_defaults`; what the caller names goes first, also where it is None.

    Args:
        call: the method.

    Returns:
        The method with the same signature.
    """
    signature = inspect.signature(call)

    @wraps(call)
    def filled(self: Any, *args: Any, **kwargs: Any) -> Any:
        defaults = call_defaults(self)
        if defaults:
            named = signature.bind_partial(self, *args, **kwargs).arguments
            kwargs = {**{name: value for name, value in defaults.items() if name not in named}, **kwargs}
        return call(self, *args, **kwargs)

    filled.takes_call_defaults = True  # pyright: ignore[reportAttributeAccessIssue]
    return cast("Call", filled)


def has_call_defaults(pipe: Any) -> bool:
    """Return whether the calls of a pipeline read `call_defaults`."""
    return getattr(type(pipe).__call__, "takes_call_defaults", False)


def call_defaults(pipe: Any) -> Mapping[str, Any]:
    """Return the arguments that calls of a pipeline take where the caller names none: the model's own, then added ones.

    A pipeline keeps the settings that suit its model in its configuration, as `defaults`; its class may name some that
    its calls don't take, as `defaults_left_out`.
    """
    left_out = getattr(type(pipe), "defaults_left_out", ())
    own = {name: value for name, value in (pipe.config.get("defaults") or {}).items() if name not in left_out}
    return {**own, **vars(pipe).get(_ATTRIBUTE, {})}


@contextmanager
def setting_call_defaults(pipe: Any, arguments: Mapping[str, Any]) -> Generator[None]:
    """Add to the defaults of a pipeline's calls for a time.

    Args:
        pipe: its class uses `takes_call_defaults`.
        arguments: by name.

    Raises:
        TypeError: the pipeline's calls read no defaults, or have no argument of a name.
    """
    if not has_call_defaults(pipe):
        raise TypeError(f"calls of {type(pipe).__name__} take no defaults: pass {', '.join(arguments)} to the call")
    unknown = sorted(set(arguments) - set(inspect.signature(type(pipe).__call__).parameters))
    if unknown:
        raise TypeError(f"{type(pipe).__name__} takes no {', '.join(unknown)}")
    before = vars(pipe).get(_ATTRIBUTE)
    vars(pipe)[_ATTRIBUTE] = {**(before or {}), **arguments}
    try:
        yield
    finally:
        if before is None:
            del vars(pipe)[_ATTRIBUTE]
        else:
            vars(pipe)[_ATTRIBUTE] = before
