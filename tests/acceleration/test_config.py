"""Accelerations as values: what they accept, what cannot go together, how they are recorded."""

import json
import re
from string import Formatter
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.acceleration import AccelerationConfig, AccelerationError
from pipelines.acceleration.conflicts import CONFLICTS
from pipelines.acceleration.handle import SWITCHES
from pipelines.acceleration.parts import MAIN_PARAMETERS, StepCachePart
from pipelines.acceleration.texts import ENGLISH

EVERY_PART: dict[str, Any] = {
    "quantization": {"bits": "w4a8", "full_precision_last": 2},
    "few_step": "lcm",
    "offload": {"mode": "model", "device": "cuda:1"},
    "attention": "flex",
    "step_cache": "fbcache:threshold=0.1",
    "guidance_cache": {"interval": [0.2, 0.9], "every": 2, "forecaster": "reuse"},
    "parallel": "guidance",
    "kv_cache": {"policy": "snapkv", "budget": 0.25},
    "next_scale": {"skip_last": 1, "prune": {"-2": 0.4}, "unguided": [-1]},
    "decoder_tiling": True,
    "compile": {"scope": "network", "dynamic": False},
}
TOGETHER = (
    ("quantization", "attention", "step_cache", "guidance_cache", "decoder_tiling", "offload", "compile"),
    ("few_step", "attention", "compile"),
    ("quantization", "kv_cache", "next_scale", "attention", "offload"),
    ("parallel", "step_cache"),
)


def refusal(values: dict[str, Any]) -> AccelerationError:
    with pytest.raises(AccelerationError) as caught:
        AccelerationConfig.from_dict(values)
    return caught.value


@pytest.mark.parametrize("names", TOGETHER)
def test_round_trip_through_json(names: tuple[str, ...]) -> None:
    config = AccelerationConfig.from_dict({name: EVERY_PART[name] for name in names})
    record = config.to_dict()
    assert set(record) == {"version", *names}
    again = AccelerationConfig.from_dict(json.loads(json.dumps(record)))
    assert again == config
    assert again.to_dict() == record
    assert set(config.parts) == set(names)


def test_every_part_is_applied_and_tested() -> None:
    assert set(AccelerationConfig.model_fields) - {"version"} == set(SWITCHES) == set(EVERY_PART)


def test_main_values_stand_for_parts() -> None:
    config = AccelerationConfig.from_dict({"step_cache": "budget=0.35", "attention": "flex", "compile": True})
    assert config.step_cache.preset == "budget"
    assert config.step_cache.params == {"budget": 0.35}
    assert config.attention.backend == "flex"
    assert config.compile.scope == "blocks"
    assert config == AccelerationConfig(step_cache="budget=0.35", attention="flex", compile=True)


@pytest.mark.parametrize("preset", MAIN_PARAMETERS)
def test_main_parameters_of_step_caches(preset: str) -> None:
    part = StepCachePart.of(preset, 0.6)
    assert part.params == {MAIN_PARAMETERS[preset]: 1 if MAIN_PARAMETERS[preset] == "every" else 0.6}
    assert StepCachePart.of(preset).params == {}
    with pytest.raises(ValueError, match="magic"):
        StepCachePart.of("magic")


def test_files_that_a_server_must_not_read_are_named() -> None:
    config = AccelerationConfig.from_dict({"step_cache": "budget=0.3,profile=/a/file"})
    assert config.files() == {"step_cache.profile": "/a/file"}
    config = AccelerationConfig.from_dict({"next_scale": {"refiner": "a/model", "refine_from": 2}})
    assert config.files() == {"next_scale.refiner": "a/model"}
    assert AccelerationConfig.from_dict({"step_cache": "easycache"}).files() == {}


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "field", "accepted"),
    [
        ({"step_cahce": "budget"}, "step_cahce", "step_cache"),
        ({"attention": {"backned": "flex"}}, "attention.backned", "backend"),
        ({"next_scale": {"skip": 1}}, "next_scale.skip", "skip_last"),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(values: dict, field: str, accepted: str) -> None:
    error = refusal(values)
    assert error.key == "refused.unknown_field"
    assert error.values["field"] == field
    assert accepted in error.values["accepted"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"step_cache": "fbcahce"}, "step_cache"),
        ({"step_cache": {"preset": "nothing"}}, "step_cache"),
        ({"step_cache": "fbcache:every=3"}, "step_cache"),
        ({"step_cache": "budget=1.5"}, "step_cache"),
        ({"step_cache": "budget=true"}, "step_cache"),
        ({"step_cache": {"preset": "taylorseer", "params": {"order": 9}}}, "step_cache"),
        ({"step_cache": {"preset": "taylorseer", "params": {"every": "often"}}}, "step_cache"),
        ({"step_cache": {"preset": "budget", "params": {"profile": {"a": 1}}}}, "step_cache"),
        ({"guidance_cache": {}}, "guidance_cache"),
        ({"guidance_cache": {"every": 0}}, "guidance_cache.every"),
        ({"guidance_cache": {"interval": [0.9, 0.1]}}, "guidance_cache"),
        ({"guidance_cache": {"interval": [0.1, float("nan")]}}, "guidance_cache.interval.1"),
        ({"kv_cache": {}}, "kv_cache"),
        ({"kv_cache": {"policy": "some"}}, "kv_cache"),
        ({"kv_cache": {"policy": "snapkv", "budget": 0}}, "kv_cache"),
        ({"next_scale": {}}, "next_scale"),
        ({"next_scale": {"prune": {"-1": 1.5}}}, "next_scale.prune.-1"),
        ({"next_scale": {"refiner": "a/model"}}, "next_scale"),
        ({"quantization": "w5a8"}, "quantization"),
        ({"quantization": {"bits": "w8a8", "full_precision_first": -1}}, "quantization.full_precision_first"),
        ({"few_step": "magic"}, "few_step"),
        ({"few_step": {"preset": "sdxl-dmd2", "steps": 8}}, "few_step"),
        ({"offload": "disk"}, "offload.mode"),
        ({"parallel": "tensor"}, "parallel.kind"),
        ({"compile": {"backend": "gcc"}}, "compile.backend"),
        ({"decoder_tiling": {"tiles": False}}, "decoder_tiling"),
        ({"attention": 3}, "attention"),
    ],
)
def test_wrong_values_are_refused_by_field(values: dict, field: str) -> None:
    error = refusal(values)
    assert (error.key, error.values["field"]) == ("refused.value", field)


def test_other_versions_are_refused() -> None:
    error = refusal({"version": 2})
    assert (error.key, error.values) == ("refused.version", {"version": 2, "accepted": 1})


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda conflict: f"{conflict.first}-{conflict.second}")
def test_what_cannot_go_together(conflict: Any) -> None:
    values = {name: EVERY_PART[name] for name in (conflict.first, conflict.second)}
    if conflict.second == "compile":
        values["offload"] = "sequential"
    if conflict.first == "attention":
        values["attention"] = {"pattern": "sol"}
        values |= {"parallel": "context"} if conflict.second == "parallel" else {}
    error = refusal(values)
    assert error.key == "refused.together"
    assert error.values == {"first": conflict.first, "second": conflict.second, "reason": conflict.reason}
    with pytest.raises(ValidationError) as caught:
        AccelerationConfig(**values)
    assert caught.value.errors()[0]["type"] == "refused.together"
    assert caught.value.errors()[0]["ctx"]["first"] == conflict.first


def test_what_differs_in_kind_goes_together() -> None:
    for values in ({"offload": "group", "compile": True}, {"few_step": "flux-hyper", "parallel": "context"}):
        assert set(AccelerationConfig.from_dict(values).parts) == set(values)


def test_values_can_not_be_changed() -> None:
    config = AccelerationConfig.from_dict({"attention": "flex"})
    with pytest.raises(ValidationError):
        config.attention = None
    with pytest.raises(ValidationError):
        config.attention.backend = "native"


def test_texts_name_their_values() -> None:
    for key, text in ENGLISH.items():
        fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        assert all(re.fullmatch(r"[a-z_]+", name) for name in fields), key
