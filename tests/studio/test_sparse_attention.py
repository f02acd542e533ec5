"""Sparse attention of a request: two options, what they stand for, and what a server refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apps.commands import attention_calibrate
from apps.service.acceleration import DENSE_FIRST, config_of
from apps.service.option_values import SERVED_ATTENTION, AttentionPattern
from apps.service.request_error import RequestError
from apps.service.requests import TextToImageRequest
from apps.service.usage import UsageError
from dit.attention.choices import Guards, amount_of
from dit.attention.plan import AttentionPlan
from pipelines.acceleration.parts import PLAN_FILE
from tests.families.tiny import tiny_pipeline

PATTERNS = [name for name in AttentionPattern.__args__ if name != "plan"]


def request(**fields: Any) -> TextToImageRequest:
    return TextToImageRequest(prompt="a red apple", **fields)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_of_the_menu_has_an_amount(name: str) -> None:
    part = config_of(request(attention_pattern=name, attention_density=0.3), can_tile=False).attention
    assert part is not None
    plan = part.make_plan()
    assert plan.choices[0].params[amount_of(name)] == 0.3
    assert plan.guards == Guards(dense_first=DENSE_FIRST)
    assert plan.choices[0].correction == "pooled_tail"


def test_the_models_own_plan() -> None:
    part = config_of(request(attention_pattern="plan", attention_density=0.5), can_tile=False).attention
    assert part is not None
    assert (part.plan, part.density, part.files()) == ("model", None, {})


def test_a_backend_and_a_pattern_exclude_each_other() -> None:
    with pytest.raises(RequestError, match=r"attention and attention_pattern can't go together"):
        config_of(request(attention_pattern="sol", attention="native"), can_tile=False)


@pytest.mark.parametrize("extra", [{"params": {"block": 8}}, {"correction": "residual"}, {"min_tokens": 5}])
def test_a_request_sets_nothing_that_costs_any_time(extra: dict[str, Any]) -> None:
    request(acceleration={"attention": {"pattern": "sol", "density": 0.2, "dense_first": 2}})
    named = f"can't have {next(iter(extra))}; it can have {', '.join(SERVED_ATTENTION)}"
    with pytest.raises(ValueError, match=named):
        request(acceleration={"attention": {"pattern": "sol", **extra}})
    with pytest.raises(ValueError, match=r"attention\.plan"):
        request(acceleration={"attention": {"plan": "/etc/passwd"}})


def test_it_is_asked_for_once() -> None:
    with pytest.raises(ValueError, match="say the same"):
        request(acceleration={"attention": "native"}, attention_pattern="sol")


def test_calibrate_writes_the_plan_into_the_models_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, seen = tiny_pipeline("text_dit"), {}
    monkeypatch.setattr(type(pipe), "name_or_path", str(tmp_path), raising=False)
    monkeypatch.setattr(attention_calibrate, "load_for_command", lambda *_: pipe)

    def search(found: Any, prompts: list[str], **options: Any) -> AttentionPlan:
        seen.update(options, prompts=prompts)
        return AttentionPlan.uniform("radial", density=0.3).for_model(found.transformer)

    survey = SimpleNamespace(table=lambda **_: None)  # so few tokens leave nothing to measure
    monkeypatch.setattr("dit.attention.search.survey_attention", lambda *_, **__: survey)
    monkeypatch.setattr("apps.commands.attention_chart.draw_search", lambda *_: None)
    monkeypatch.setattr("dit.attention.search.search_plan", search)
    attention_calibrate.run("tiny", prompts=["a red apple"], density=0.3, steps=4)
    assert AttentionPlan.load(tmp_path / PLAN_FILE).architecture
    assert seen["prompts"] == ["a red apple"]
    assert (seen["density"], seen["error"], seen["num_inference_steps"]) == (0.3, None, 4)
    assert "radial(density=0.3)" in capsys.readouterr().out
    with pytest.raises(UsageError, match="exclude each other"):
        attention_calibrate.run("tiny", error=0.1, density=0.3)
