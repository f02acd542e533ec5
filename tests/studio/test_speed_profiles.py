"""`profile` of a request: resolved from a tuning of the model, reported, refused where nothing is known."""

import json

import pytest

from apps.service.acceleration import config_of
from apps.service.reports import TEXTS
from apps.service.request_error import RequestError
from apps.service.requests import TASKS
from apps.service.speed_profiles import resolve_profile
from pipelines import info_of, load_pipeline

TEXT = TASKS["text_to_image"]


@pytest.fixture(scope="module")
def stickers():
    return load_pipeline("stickers")


def test_a_profile_becomes_the_parts_that_the_tuning_found_without_what_no_request_may_have(stickers):
    found = resolve_profile("balanced", stickers, info_of(stickers), {"num_inference_steps": 8})
    assert set(found.parts) == {"step_cache"}  # the tuning compiles, too
    config = config_of(TEXT(prompt="a", profile="balanced"), can_tile=False, profile=found.parts)
    assert config.step_cache is not None
    assert config.step_cache.preset == "budget"
    said = found.report.text(TEXTS)
    assert said.startswith("profile balanced: 2.8x at 31.3 dB when tuned (without compile")
    assert "steps" not in said


def test_what_differs_from_the_tuning_is_said(stickers):
    found = resolve_profile("balanced", stickers, info_of(stickers), {"num_inference_steps": 12, "height": 64})
    reason = next(one for one in found.report.reasons if one.key == "why.profile_conditions")
    assert {"steps", "shape"} <= set(reason.values["names"].split(", "))


@pytest.mark.parametrize("other", [{"step_cache": "fbcache"}, {"quantization": "w8a8"}, {"acceleration": {}}])
def test_a_profile_beside_what_it_decides_is_refused(other):
    other = {"acceleration": {"guidance_cache": {"every": 2}}} if "acceleration" in other else other
    other = {"step_cache": {"preset": "taylorseer"}} if "step_cache" in other else other
    with pytest.raises(ValueError, match="say the same"):
        TEXT.model_validate({"prompt": "a", "profile": "fastest", **other})


def test_a_model_of_which_nothing_is_known_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe = load_pipeline("stickers-var")
    with pytest.raises(RequestError, match="tessera tune") as refused:
        resolve_profile("balanced", pipe, info_of(pipe), {})
    assert refused.value.key == "profile"


def test_the_files_that_a_tuning_names_may_not_be_named_by_a_request():
    parts = {"step_cache": {"preset": "budget", "params": {"budget": 0.25, "profile": "tuning.output.safetensors"}}}
    with pytest.raises(ValueError, match="names of files"):
        TEXT.model_validate({"prompt": "a", "acceleration": parts})
    assert TEXT.model_validate_json(json.dumps({"prompt": "a", "profile": "faithful"})).profile == "faithful"
