"""Typing of what diffusers' base classes leave untyped; nothing of it exists at run time."""

from typing import TYPE_CHECKING, Any


class Typed:
    """First base of our components: their configuration has its keys as attributes, and checkpointing is callable."""

    if TYPE_CHECKING:
        _gradient_checkpointing_func: Any

        @property
        def config(self) -> Any:
            """The frozen configuration, with its keys as attributes too."""
