"""Every component class can be found again by diffusers' loader.

diffusers writes a component's module path into model_index.json and finds the class again by rules that a module
can break by its name or by what it does not import; the component then saves and never loads.
"""

import importlib
import inspect
import pkgutil
import sys

import diffusers
import pytest
from diffusers import ModelMixin, SchedulerMixin

from pipelines.loading.model_index import COMPONENT_MODULES

ROOMS = ("dit.models", "dit.tokenizers", "sampling.schedulers")
BASES = (ModelMixin, SchedulerMixin)


def components() -> list[type]:
    """Every loadable class that is defined in a room for components."""
    rooms = [importlib.import_module(name) for name in ROOMS]
    names = [found.name for room in rooms for found in pkgutil.walk_packages(room.__path__, f"{room.__name__}.")]
    modules = [*rooms, *(importlib.import_module(name) for name in sorted(names))]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, BASES) and value.__module__ == module.__name__
    ]


def test_there_are_components() -> None:
    assert {"TextDiT", "DiT", "ViTAutoencoder"} <= {component.__name__ for component in components()}


def test_the_loader_may_import_every_component() -> None:
    assert {component.__module__ for component in components()} <= COMPONENT_MODULES


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
