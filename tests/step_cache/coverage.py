"""Says where the step cache works: on every transformer, and in every whole pipeline, that diffusers' tests build.

`python -m tests.step_cache.coverage CHECKOUT [REPORT.json]`, with a checkout of diffusers, of whose tests it takes tiny
configurations and inputs; pipelines of ours are run too. Not a test: it needs that checkout (their sdist is without
tests), and what their tests and pipelines import. A network may work where its pipeline does not: a pipeline has to let
the cache find its steps.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
REQUIRED = ("ftfy", "parameterized", "requests_mock", "scipy", "sentencepiece", "torchsde")
"""What their tests import, and their pipelines where they are run, that tessera does not need."""
MASK = (True, True, False, True, False, False, True, True)


def cases(folder: Path) -> Iterator[tuple[type, Any]]:
    """(class of the network, instance of its test class) of all test files."""
    for file in sorted((folder / "models" / "transformers").glob("test_models_*.py")):
        try:
            module = importlib.import_module(f"tests.models.transformers.{file.stem}")
        except Exception as error:  # whatever a foreign test file needs
            yield type(None), f"{file.stem}: {type(error).__name__}: {error}"
            continue
        for _, case in inspect.getmembers(module, inspect.isclass):
            kind = inspect.getattr_static(case, "model_class", None)
            if case.__module__ != module.__name__ or not isinstance(kind, type | property):
                continue
            instance = case() if not issubclass(case, importlib.import_module("unittest").TestCase) else case("run")
            yield instance.model_class, instance


def build(instance: Any) -> tuple[Any, dict[str, Any]]:
    """A network of theirs and inputs for it."""
    if hasattr(instance, "get_init_dict"):
        config, inputs = instance.get_init_dict(), instance.get_dummy_inputs()
    else:
        config, inputs = instance.prepare_init_args_and_inputs_for_common()
    torch.manual_seed(0)
    model = instance.model_class(**config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model, inputs


def changed(value: Any, step: int) -> Any:
    """Inputs of a later step: images and texts a little weaker."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 2:
        return value * (1 - 0.04 * step)
    if isinstance(value, list):
        return [changed(item, step) for item in value]
    return value


@torch.no_grad()
def run(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """The outputs of all steps."""
    from dit.runtime.step_context import StepContext, next_run, step_scope
    from sampling.step_cache.values import flatten

    outputs, number = [], next_run()
    for step in range(STEPS):
        sigma = 1 - step / STEPS
        given = {key: changed(value, step) if "hidden" in key or key == "x" else value for key, value in inputs.items()}
        torch.manual_seed(1)
        with step_scope(StepContext(number, step, STEPS, sigma, 1000 * sigma, "cond")):
            outputs.append([tensor.clone() for tensor in flatten(model(**given))[0]])
    return outputs


def alike(one: list, other: list) -> bool:
    """Whether two runs gave the same bits."""
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def examine(instance: Any, region: str) -> str:
    """ "ok", or what went wrong."""
    from sampling.step_cache import StepCache
    from sampling.step_cache.forecasters import Newton, Reuse
    from sampling.step_cache.gates import Mask
    from sampling.step_cache.regions import Blocks, Output

    model, inputs = build(instance)
    calls = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    plain = run(model, inputs)
    if not alike(plain, run(model, inputs)):
        return "its own runs differ"
    places = {"output": Output(), "blocks": Blocks(0)}
    with StepCache(Mask((True,) * STEPS), region=places[region]).attach(model):
        if not alike(plain, run(model, inputs)):
            return "a full budget changes bits"
    found = {}
    for forecaster in (Newton(1), Reuse()):
        calls.clear()
        with StepCache(Mask(MASK), forecaster, places[region]).attach(model) as attached:
            found[type(forecaster)] = run(model, inputs)
            report = attached.report()
        if report["strip"] != {"cond": "CC.C..CC"} or report["inactive"]:
            return f"decisions {report['strip']}, inactive {report['inactive']}"
        if region == "output" and len(calls) != sum(MASK):
            return f"{len(calls)} calls instead of {sum(MASK)}"
    if alike(found[Newton], found[Reuse]):
        return "a forecast is the same as reuse"
    return "ok" if alike(plain, run(model, inputs)) else "something stayed behind"


def lend_resize() -> None:
    """Lend Cosmos the one function of torchvision, not installed here, that it calls: a resize to the nearest."""
    functional = SimpleNamespace(resize=lambda picture, size, interpolation: F.interpolate(picture, size))
    lent = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    for name in ("transformers.transformer_cosmos", "controlnets.controlnet_cosmos"):
        module = importlib.import_module(f"diffusers.models.{name}")
        if not hasattr(module, "transforms"):
            module.transforms = lent  # pyright: ignore[reportAttributeAccessIssue]


def _pipelines() -> Any:
    """Load our part, then make room for their package of the same name."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module("tests.step_cache.pipelines")
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    return module


def _of_network(name: str, whole: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """What became of a network's pipelines."""
    return {"pipelines": {key: found["pipeline"] for key, found in whole.items() if found.get("network") == name}}


def read_arguments() -> argparse.Namespace:
    """Read the command line and refuse what cannot work, before anything is run."""
    parser = argparse.ArgumentParser(prog="python -m tests.step_cache.coverage", description=str(__doc__))
    parser.add_argument("checkout", type=Path, help="folder of a checkout of diffusers, with its tests")
    parser.add_argument("report", type=Path, nargs="?", help="file to write; stdout if left out")
    arguments = parser.parse_args()
    if not (arguments.checkout / "tests" / "pipelines").is_dir():
        parser.error(f"{arguments.checkout} has no folder tests/pipelines; name a checkout of diffusers' repository")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed; pip install {' '.join(missing)}")
    return arguments


def version_of(checkout: Path) -> str:
    """Return the version that a checkout of diffusers says it has."""
    text = (checkout / "src" / "diffusers" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.*)"', text)
    return found[1] if found else "unknown"


def main(checkout: Path, report: Path | None) -> None:
    """Examine all and write the report."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # what their tests load has a stand-in, or is said to have none
    lend_resize()
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, str]] = {}
    pipelines = _pipelines()
    sys.path[:0] = [str(checkout)]
    for network, instance in cases(checkout / "tests"):
        if isinstance(instance, str):
            results.setdefault("not imported", {})[instance[:200]] = ""
            continue
        name = network.__name__
        if results.get(name, {}).get("blocks") == "ok":
            continue
        for region in ("output", "blocks"):
            if results.get(name, {}).get(region) == "ok":
                continue
            try:
                verdict = examine(instance, region)
            except Exception as error:  # one line for each network, whatever happens in it
                verdict = f"{type(error).__name__}: {error}"[:300]
            results.setdefault(name, {})[region] = verdict
            sys.stderr.write(f"{name} {region}: {verdict}\n")
    networks = {name: found for name, found in results.items() if name != "not imported"}
    summary = {region: sum(found[region] == "ok" for found in networks.values()) for region in ("output", "blocks")}
    whole = pipelines.examine_all(checkout / "tests", lambda line: sys.stderr.write(line + "\n"))
    states = Counter(found["pipeline"] for found in whole.values())
    text = json.dumps(
        {
            "diffusers": importlib.import_module("diffusers").__version__,
            "tests of": version_of(checkout),
            "networks": len(networks),
            "work": summary,
            "pipelines": dict(states.most_common()),
            "results": {name: {**found, **_of_network(name, whole)} for name, found in networks.items()},
            "whole pipelines": whole,
            "pipelines without a case": pipelines.without_case(whole),
            "not imported": results.get("not imported", {}),
        },
        indent=2,
    )
    if report is None:
        sys.stdout.write(text + "\n")
    else:
        report.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    given = read_arguments()
    main(given.checkout, given.report)
