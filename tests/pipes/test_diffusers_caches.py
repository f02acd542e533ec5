"""Step caches of diffusers work on our pipelines once they are imported, with nothing else called before."""

import json

import pytest

from tests.fresh import run_python
from tests.pipes.diffusers_caches import CONFIGS, PIPELINES


@pytest.fixture(scope="module")
def told():
    """What a fresh process tells."""
    _, out, _ = run_python("-m", "tests.pipes.diffusers_caches")
    return json.loads(out)


@pytest.mark.parametrize("cache", CONFIGS)
@pytest.mark.parametrize("name", PIPELINES)
def test_enabled_run_and_disabled(told, name, cache):
    found = told[f"{name} {cache}"]
    rows, cached, after = found["rows"]
    assert 0 < cached < rows, "the cache left nothing out"
    assert found["is_finite"]
    assert found["is_same_after"]
    assert after == rows
    assert found["timestep_after"] is None
