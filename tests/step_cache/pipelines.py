"""Runs whole pipelines with a step cache on them: which steps are computed, which forecast, and if none, why."""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.families.tiny import TINY_NAMES, VARIANTS, tiny_call, tiny_pipeline
from tests.step_cache.molecules import rfd4
from tests.step_cache.stand_ins import fit_vocabularies, small_pictures, stand_ins

STEPS = 6
ALONE = {"intermediate_timesteps": None}
"""What calls need for as many steps."""
Build = Callable[[], tuple[Any, dict[str, Any]]]


def cases(folder: Path) -> Iterator[tuple[str, Build | str]]:
    """(name of the pipeline, how to build it and its call) of our tiny pipelines and of those in diffusers' tests.

    Args:
        folder: `tests` of a checkout of diffusers.

    Yields:
        Of files that cannot be imported, the reason instead.
    """
    for name in (*TINY_NAMES, *VARIANTS):
        yield name, partial(_ours, name)
    yield "RFD4ProteinaPipeline", partial(rfd4, STEPS)
    for file in sorted((folder / "pipelines").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if "get_dummy_components" not in text or not re.search(r'transformer"?(: | ?=)', text):
            continue
        module_name = ".".join(("tests", *file.relative_to(folder).with_suffix("").parts))
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever a foreign test file needs
            yield file.stem, f"{type(error).__name__}: {error}"
            continue
        for _, case in inspect.getmembers(module, inspect.isclass):
            owns = {"get_dummy_components", "get_dummy_inputs"} <= set(vars(case))
            if owns and case.__module__ == module_name and _denoises(case.pipeline_class):
                yield case.pipeline_class.__name__, partial(_theirs, case, case.pipeline_class)


def _class_of(pipe: Any) -> str:
    """The name of a pipeline's class, or of the one that a test derived it from."""
    return next(kind.__name__ for kind in type(pipe).__mro__ if not kind.__module__.startswith("tests."))


def without_case(results: dict[str, dict[str, Any]]) -> list[str]:
    """Name the pipelines of diffusers with a transformer that no case was found for."""
    diffusers = importlib.import_module("diffusers")
    names = [name for name in dir(diffusers) if name.endswith("Pipeline") and name not in results]
    return [name for name in names if isinstance(kind := getattr(diffusers, name), type) and _denoises(kind)]


def _denoises(pipeline: type) -> bool:
    """Whether a pipeline has a transformer among its components."""
    return any(name.startswith("transformer") for name in inspect.signature(pipeline.__init__).parameters)


def _ours(name: str) -> tuple[Any, dict[str, Any]]:
    return tiny_pipeline(name), tiny_call(name)


def _theirs(case: type, kind: type) -> tuple[Any, dict[str, Any]]:
    instance = case("run") if issubclass(case, importlib.import_module("unittest").TestCase) else case()
    takes_device = "device" in inspect.signature(instance.get_dummy_inputs).parameters
    torch.manual_seed(0)
    with stand_ins():
        components = instance.get_dummy_components()
        call = instance.get_dummy_inputs("cpu") if takes_device else instance.get_dummy_inputs()
    fit_vocabularies(components)
    return kind(**components), call


def examine(build: Build) -> dict[str, Any]:
    """Run a pipeline with every second step to be forecast.

    Returns:
        The "class" of the pipeline, its "network" and, as "pipeline", what became of it with forecasts of the network's
        output: "skips" (steps are forecast), "skips in part" (of some calls the step was not found),
        "inactive" (it runs, but all steps are computed), "refused" (the cache did not attach), "fails with the cache",
        "not built" or "not run"; with the steps by branch, and the reason. "blocks" says the same of forecasts of what
        the blocks add.
    """
    from sampling.step_cache.regions import Blocks, Output

    try:
        pipe, call = build()
    except Exception as error:  # their configurations may be of another version
        return {"pipeline": "not built", "reason": _short(error)}
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    found: dict[str, Any] = {"class": _class_of(pipe), "network": type(getattr(pipe, "transformer", None)).__name__}
    takes = inspect.signature(type(pipe).__call__).parameters
    call |= {name: value for name, value in {"num_inference_steps": STEPS, **ALONE}.items() if name in takes}
    try:
        _run(pipe, call)
    except Exception as error:  # without a cache on it: the case itself does not work here
        return {**found, "pipeline": "not run", "reason": _short(error)}
    state, blocks = _cached(pipe, call, Output()), _cached(pipe, call, Blocks(0))
    same = blocks["pipeline"] == state["pipeline"] and blocks.get("steps") == state.get("steps")
    told = blocks["pipeline"] if same else ": ".join(filter(None, (blocks["pipeline"], blocks.get("reason"))))
    return {**found, **state, "blocks": told}


def _cached(pipe: Any, call: dict[str, Any], region: Any) -> dict[str, Any]:
    """Run with a cache; see `examine`."""
    from sampling.step_cache import StepCache
    from sampling.step_cache.engine import UNPLACED
    from sampling.step_cache.forecasters import Newton
    from sampling.step_cache.gates import Interval

    try:
        attached = StepCache(Interval(2, first=2, offset=1), Newton(), region).attach(pipe)
    except Exception as error:  # one line for each pipeline, whatever happens in it
        return {"pipeline": "refused", "reason": _short(error)}
    with attached:
        try:
            _run(pipe, call)
        except Exception as error:  # as above
            return {"pipeline": "fails with the cache", "reason": _short(error)}
        report = attached.report()
    steps = {"steps": report["strip"]}
    if not report["skipped"]:
        return {"pipeline": "inactive", **steps, "reason": report["why_inactive"]}
    beside = ", ".join(f"{count} calls: {reason}" for reason, count in report["inactive"].items())
    state = "skips in part" if str(UNPLACED) in report["inactive"] else "skips"
    return {"pipeline": state, **steps, **({"reason": beside} if beside else {})}


@torch.no_grad()
def _run(pipe: Any, call: dict[str, Any]) -> None:
    seeded = {"generator": torch.Generator().manual_seed(0)} if "generator" in call else {}
    with small_pictures():
        pipe(**{**call, **seeded})


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def examine_all(folder: Path, told: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """Examine every case; of several cases of a pipeline the worst one that runs counts.

    Args:
        folder: see `cases`.
        told: called with a line for each case.
    """
    order = ("fails with the cache", "refused", "inactive", "skips in part", "skips")
    order += ("not run", "not built", "not imported")
    results: dict[str, dict[str, Any]] = {}
    for name, build in cases(folder):
        found = {"pipeline": "not imported", "reason": build} if isinstance(build, str) else examine(build)
        key = found.pop("class", name)
        told(f"{key}: {json.dumps(found)}")
        if key not in results or order.index(found["pipeline"]) < order.index(results[key]["pipeline"]):
            results[key] = found
    return results
