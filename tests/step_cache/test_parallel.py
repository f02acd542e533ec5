"""Two gloo processes against one: guidance in parallel, tokens cut in two, caches that decide alike."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dit.runtime.hooks import AttachError
from sampling.parallel import GuidanceParallel, context_parallel
from tests.families.tiny import tiny_pipeline
from tests.fresh import Python
from tests.step_cache.two_processes import NAMES


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    files = [str(folder / "store"), str(folder / "result")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [Python("-m", "tests.step_cache.two_processes", str(rank), *files, env=environment) for rank in (0, 1)]
    for process in processes:
        _, told = process.communicate(170)
        assert process.poll() == 0, told[-2000:]
    return [json.loads(Path(f"{files[1]}.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_guidance_in_parallel_is_guidance(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert rank["guidance"][name]["error"] <= 1e-6
        assert rank["guidance"][name]["calls"] == 5, "each process computes one branch a step"
        assert rank["guidance"][name]["inactive"] == {}


def test_caches_decide_alike_on_all_ranks(found: list[dict[str, Any]]) -> None:
    ours, theirs = found[0]["cached"]["strips"]
    assert ours == theirs
    assert found[1]["cached"]["strips"] == [ours, theirs]
    assert "." in ours[0]
    assert "C" in ours[0][1:]


def test_tokens_on_two_processes_are_exact(found: list[dict[str, Any]]) -> None:
    assert max(rank["ulysses"] for rank in found) <= 1e-5


def test_parallel_parts_of_an_acceleration(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for kind, seen in rank["accelerated"]["kinds"].items():
            assert seen["error"] <= 1e-5, kind
            assert (seen["active"], seen["exact"], seen["clean"]) == (True, True, True), kind
        ours, theirs = rank["accelerated"]["strips"]
        assert ours == theirs
        assert "." in ours[0]


def test_one_process_is_not_enough() -> None:
    pipe = tiny_pipeline("flux")
    with pytest.raises(AttachError, match="group of 2 processes, got 1"):
        GuidanceParallel().attach(pipe)
    with pytest.raises(AttachError, match="torchrun"):
        context_parallel(pipe.transformer)
