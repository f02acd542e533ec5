"""The tiny pipelines themselves: quick, reproducible, and folders like published ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.runtime.families import FAMILIES
from dit.runtime.timing import count_flops
from tests.families.bare import BARE_NAMES
from tests.families.tiny import BUILDERS, CALLS, TINY_NAMES, VARIANTS, tiny_call, tiny_pipeline

ALL = (*TINY_NAMES, *VARIANTS)


def paint(pipe: Any, name: str) -> torch.Tensor:
    output = pipe(**tiny_call(name))
    return torch.as_tensor(next(iter(output.values())))


def test_every_row_has_a_pipeline_and_a_call() -> None:
    assert tuple(row.name for row in FAMILIES) == (*TINY_NAMES, *BARE_NAMES)
    assert set(ALL) == set(BUILDERS) == set(CALLS)


@pytest.mark.parametrize("name", ALL)
def test_saves_loads_and_paints_the_same(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(name)
    painted = paint(pipe, name)
    assert count_flops(lambda: paint(pipe, name)) < 2e9  # tiny: a second of work at most
    assert painted.isfinite().all()
    assert painted.std() > 0.01

    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) < 20e6
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert {type(part) for part in loaded.components.values()} == {type(part) for part in pipe.components.values()}
    torch.testing.assert_close(paint(loaded, name), painted, rtol=1e-4, atol=1e-4)


def test_seed_decides_the_weights() -> None:
    one, two, other = tiny_pipeline("wan"), tiny_pipeline("wan"), tiny_pipeline("wan", seed=1)
    assert torch.equal(paint(one, "wan"), paint(two, "wan"))
    assert not torch.equal(paint(one, "wan"), paint(other, "wan"))
