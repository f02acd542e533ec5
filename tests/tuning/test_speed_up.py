"""`speed_up` with a setting or a profile: applied, reported, undone to the bit, refused with the reason."""

import json
import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipelines
from pipelines import speed_up
from pipelines.acceleration import AccelerationConfig, AccelerationError
from pipelines.tuning.profiles import NAMES
from tests.acceleration.test_apply import generate, make, traces

CACHE = {"step_cache": "fora:every=2"}
LOGGER = "pipelines.tuning.handle"


@pytest.fixture
def pipe() -> Any:
    return make("text")


def test_no_module_takes_the_name_of_the_function() -> None:
    import_module("pipelines.tuning.speed_up")
    assert pipelines.speed_up is speed_up
    assert find_spec("pipelines.speed_up") is None


@pytest.mark.parametrize("name", ["text", "dit", "pixart", "flux", "next-scale class"])
def test_a_setting_is_applied_and_undone_to_the_bit(name: str) -> None:
    pipe = make(name)
    plain, clean = generate(pipe, name), traces(pipe)
    setting = {"next_scale": {"skip_last": 1}} if "scale" in name else CACHE
    handle = speed_up(pipe, setting)
    fast: Tensor = generate(pipe, name, **handle.call_arguments)
    report = handle.report()
    handle.undo()
    assert not handle.is_applied
    assert not torch.equal(fast, plain)
    assert traces(pipe) == clean
    assert torch.equal(generate(pipe, name), plain)
    assert report.inactive == ()
    assert "maybe_free_model_hooks" not in vars(pipe)


def test_settings_are_read_in_every_form(pipe: Any, tmp_path: Path) -> None:
    config = AccelerationConfig.from_dict(CACHE)
    file = tmp_path / "fast.json"
    file.write_text(json.dumps(config.to_dict()))
    for form in (config, CACHE, config.to_dict(), file, str(file)):
        with speed_up(pipe, form) as handle:
            assert handle.config == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give config, or profile, or goals"),
        ({"config": CACHE, "quality": "psnr>=30"}, "give config, or profile, or goals"),
        ({"config": {}}, "nothing to attach"),
        ({"config": {"step_cash": "budget=0.5"}}, "step_cash is not known"),
        ({"config": {"kv_cache": "window"}}, "next-scale pipeline"),
        ({"config": {"few_step": "lcm", "step_cache": "fora"}}, "few_step"),
        ({"quality": "good"}, "psnr>=30"),
        ({"profile": "quickest"}, "balanced"),
        ({"profile": "balanced"}, "tessera tune"),
        ({"profile": "missing.json"}, "missing.json"),
        ({"config": "missing.json"}, "missing.json"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_stays(pipe: Any, given: dict[str, Any], said: str) -> None:
    clean = traces(pipe)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        speed_up(pipe, **given)
    assert traces(pipe) == clean


def test_a_part_that_did_nothing_is_told_once_and_reported(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, LOGGER)
    with speed_up(pipe, {"guidance_cache": {"every": 2}, **CACHE}) as handle:
        generate(pipe, "text", guidance_scale=1.0)  # one branch: no guidance to save
        told = [one.message for one in caplog.records if one.name == LOGGER]
        assert len(told) == 1
        assert "guidance cache" in told[0]
        assert "one branch" in told[0]
        generate(pipe, "text", guidance_scale=1.0)
        report = handle.report()
    assert len([one for one in caplog.records if one.name == LOGGER]) == 1
    assert report.inactive == ("guidance_cache",)
    assert "did nothing" in report.text()


def test_a_call_that_never_came_is_no_failure(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    with speed_up(pipe, CACHE) as handle:
        assert handle.report().inactive == ("step_cache",)
    assert not [one for one in caplog.records if one.name == LOGGER]


def test_measured_gains_stand_in_the_report_and_in_json(pipe: Any) -> None:
    plain = generate(pipe, "text")
    with speed_up(pipe, {**CACHE, "guidance_cache": {"every": 2}}) as handle:
        assert "not known" in handle.report().text()
        report = handle.measure("a cat", rounds=1, num_inference_steps=6)
        assert handle.is_applied
        with pytest.raises(ValueError, match="rounds=0"):
            handle.measure("a cat", rounds=0)
    assert set(report.measured) == {"step_cache", "guidance_cache", "all"}
    assert all(gain > 0 for gain in report.measured.values())
    assert report.inactive == ()
    written = json.loads(json.dumps(report.to_dict()))
    assert [part["part"] for part in written["parts"]] == ["step_cache", "guidance_cache"]
    assert f"{report.measured['all']:.2f}x" in report.text()
    assert torch.equal(generate(pipe, "text"), plain)


def test_an_outer_acceleration_is_left_first(pipe: Any) -> None:
    inner = speed_up(pipe, CACHE)
    outer = AccelerationConfig.from_dict({"guidance_cache": {"every": 2}}).apply(pipe)
    with pytest.raises(AccelerationError, match="leave that one first"):
        inner.undo()
    outer.undo()
    inner.undo()
    assert not inner.is_applied


@pytest.mark.parametrize("name", NAMES)
def test_families_of_diffusers_have_starting_points_that_say_they_are_unverified(name: str) -> None:
    with speed_up(make("flux"), profile=name) as handle:
        report = handle.report()
    assert report.origin == ("general" if name == "low-memory" else "family")
    assert any("verified" in note and "tessera tune" in note for note in report.notes)
    assert not report.quality


def test_quantized_weights_are_undone_to_the_bit(pipe: Any) -> None:
    plain = generate(pipe, "text")
    with speed_up(pipe, profile="low-memory") as handle:
        generate(pipe, "text")
        assert "quantized" in handle.report().text()
    assert torch.equal(generate(pipe, "text"), plain)
