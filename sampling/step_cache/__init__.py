"""Caching across denoising steps: compute some, forecast the others, within a budget.

    from sampling.step_cache import StepCache, calibrate_budget

    profile = calibrate_budget(pipe, ["a red apple"], steps=28)
    with StepCache.preset("budget", budget=0.35, profile=profile).attach(pipe):
        pipe("a penguin left of a rocket")

A cache is a gate (which steps are computed) x a forecaster (what stands in for the others) x a region (of which part
of the network). Names are looked up when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sampling.step_cache import forecasters, gates, regions
    from sampling.step_cache.calibration import calibrate_budget
    from sampling.step_cache.presets import PRESETS, StepCache
    from sampling.step_cache.profile import Profile

__all__ = ["PRESETS", "Profile", "StepCache", "calibrate_budget", "forecasters", "gates", "regions"]

# The module of presets brings the engine, whose `StepCache.preset` must know them.
_HOMES = {"StepCache": "presets", "Profile": "profile", "PRESETS": "presets", "calibrate_budget": "calibration"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sampling.step_cache.{_HOMES[name]}"), name)
    if name in ("forecasters", "gates", "regions"):
        return import_module(f"sampling.step_cache.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
