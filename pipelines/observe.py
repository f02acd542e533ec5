"""One calibration pass for all engines; it lives in `sampling.observe`, beside the engines that calibrate."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from sampling.observe import Observation, Observer, observe

__all__ = ["Observation", "Observer", "observe"]


class _CallableModule(ModuleType):
    """Python binds `pipelines.observe` to this module once it is imported; then calling that still observes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Observation:
        return observe(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
