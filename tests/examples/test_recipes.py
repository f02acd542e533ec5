"""The recipes of docs/recipes.md run on tiny pipelines of the same classes, are active, and leave without a trace."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import pipelines
from pipelines import NextScaleClassToImagePipeline
from tests.families import every
from tests.families.tiny import BUILDERS, CALLS
from tests.models import tiny_next_scale
from tests.pipes.test_next_scale_text import of_bits

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECIPES = dict(re.findall(r"```python (\w+)\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL))
SETUP = RECIPES.pop("setup")
FEW_STEPS = 8
LARGER = {"wan22": {"height": 64, "width": 64, "num_frames": 33}}
"""Where attention is to be sparse."""
SIZES = ("height", "width", "num_frames", "video_length")


def build(name: str) -> Any:
    if name == "var":
        return NextScaleClassToImagePipeline(tiny_next_scale.transformer(), tiny_next_scale.tokenizer())
    return of_bits() if name == "infinity" else every.build(name)


class Small:
    """A pipeline whose calls are made small: few pixels, frames and steps; everything else is the recipe's.

    Args:
        name: of the recipe.
    """

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "pipe", build(name))
        object.__setattr__(self, "calls", 0)
        object.__setattr__(self, "name", name)

    def __call__(self, *prompt: Any, **given: Any) -> Any:
        object.__setattr__(self, "calls", self.calls + 1)
        if self.name not in ("var", "infinity"):
            small = CALLS.get(
                self.name, {"height": every.side(self.name), "width": every.side(self.name), "num_frames": 9}
            )
            given |= {key: small[key] for key in SIZES if key in small} | every.options(self.name)
            given |= LARGER.get(self.name, {})
            given["num_inference_steps"] = FEW_STEPS
        return self.pipe(*prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit.quant.roles.LEAST_WIDTH", 8)  # tiny networks are quantized too
    small, asked = Small(name), []
    small.pipe.set_progress_bar_config(disable=True)
    reports: list[Any] = []

    def load(model: str, dtype: str) -> Any:
        asked.append((model, dtype))
        return small.pipe

    scope: dict[str, Any] = {}
    with patch.object(pipelines, "load_pipeline", load):
        exec(SETUP, scope)  # noqa: S102
    code = RECIPES[name].replace("pipe(", "small(")
    assert code.count("small(") == 1
    scope |= {"small": small, "print": reports.append, "load_pipeline": load}
    before = dict(small.pipe.transformer.named_modules())
    with torch.no_grad():
        exec(code, scope)  # noqa: S102
    assert small.calls == 1
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", asked[0][0])
    report = scope["acceleration"].report()
    assert {one.part for one in report.parts} == set(scope["config"].parts)
    assert report.inactive == (), report.text()
    assert reports == [report.text()]
    assert dict(small.pipe.transformer.named_modules()) == before


def test_all_families_of_the_promise_have_a_recipe() -> None:
    wanted = {"flux", "flux2", "qwen_image", "z_image", "sd3", "pixart_sigma", "wan22", "ltx2", "hunyuan_video15",
              "cogvideox", "var", "infinity"}  # fmt: skip
    assert set(RECIPES) == wanted
    assert set(RECIPES) - {"var", "infinity"} <= {*BUILDERS, *every.moving.BUILDERS}
