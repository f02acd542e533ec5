"""Every component class can be found again by diffusers' loader.

diffusers writes a component's module path into model_index.json and finds the class again by rules that a module
can break by its name or by what it does not import; the component then saves and never loads.
"""

import importlib
import inspect
import sys

import diffusers
import pytest
from diffusers import ModelMixin, SchedulerMixin

PUBLIC_MODULES = ("dit.models", "dit.tokenizers", "sampling.schedulers")
BASES = (ModelMixin, SchedulerMixin)


def components() -> list[type]:
    """Every loadable class that the public modules export."""
    found = {}
    for name in PUBLIC_MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and name.startswith(error.name):
                continue  # a room that has no content yet
            raise
        for value in vars(module).values():
            ours = inspect.isclass(value) and value.__module__.split(".")[0] in {"dit", "sampling"}
            if ours and issubclass(value, BASES):
                found[f"{value.__module__}.{value.__name__}"] = value
    return [found[key] for key in sorted(found)]


def test_there_are_components() -> None:
    assert {"TextDiT", "ViTAutoencoder"} <= {component.__name__ for component in components()}


@pytest.mark.parametrize("component", components(), ids=lambda component: component.__name__)
def test_component_can_be_found_again(component: type) -> None:
    parts = component.__module__.split(".")
    assert len(parts) > 1, "a class in a package's top __init__ is taken for a pipeline of diffusers"
    assert not hasattr(diffusers.pipelines, parts[-2]), f"diffusers.pipelines has an attribute {parts[-2]!r}"
    base = next(base for base in BASES if issubclass(component, base))
    module = vars(sys.modules[component.__module__])
    assert module.get(base.__name__) is base, (
        f"{component.__module__} must import {base.__name__} by name: the loader looks it up there"
    )


@pytest.mark.parametrize("component", components(), ids=lambda component: component.__name__)
def test_component_has_a_name_of_its_own(component: type) -> None:
    """Under a name of diffusers' the generic loaders would silently build diffusers' class."""
    assert not hasattr(diffusers, component.__name__)
