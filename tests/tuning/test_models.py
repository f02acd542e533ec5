"""The cost and the error model against combinations that follow their assumptions, and those that don't."""

from types import SimpleNamespace

import pytest

from pipelines.tuning.cost_model import CostModel
from pipelines.tuning.error_model import ErrorModel
from pipelines.tuning.goals import Goal
from pipelines.tuning.measurement import Measurement
from pipelines.tuning.progress import Budget
from pipelines.tuning.tuner import Tuner, combinations_of

NETWORK = 0.8
"""Share of a plain request inside the network."""


def single(technique: str, value: object, inside: float, psnr: float, **more: float) -> Measurement:
    return Measurement(
        {technique: value},
        "single",
        inside + 1 - NETWORK,
        inside,
        psnr=(psnr, psnr + 2),
        **more,  # pyright: ignore
    )


CACHE = single("step_cache", 0.25, 0.3, 35.0, computed_share=0.25)  # 0.2 computed, 0.1 of forecasts
STRONGER = single("step_cache", 0.1, 0.16, 28.0, computed_share=0.1)
HALF = single("compile", True, 0.4, 45.0)
GUIDANCE = single("guidance_cache", 2, 0.6, 38.0)
SINGLES = {one.key: one for one in (CACHE, STRONGER, HALF, GUIDANCE)}


def together(*singles: Measurement, share: float, psnr: tuple[float, ...] = ()) -> Measurement:
    parts = {name: value for one in singles for name, value in one.parts.items()}
    return Measurement(parts, "pair", share, psnr=psnr)


def test_forecasts_are_not_made_faster_by_what_makes_calls_faster() -> None:
    model = CostModel(NETWORK, SINGLES)
    assert model.predict([CACHE.key]) == pytest.approx(0.5)
    assert model.predict([CACHE.key, HALF.key]) == pytest.approx(0.2 + 0.5 * 0.2 + 0.1)


def test_a_factor_of_a_pair_is_learned_and_carried_to_other_strengths() -> None:
    model = CostModel(NETWORK, SINGLES)
    keys = [CACHE.key, HALF.key]
    model.learn(keys, together(CACHE, HALF, share=0.2 + 0.15 + 0.1))
    assert model.predict(keys) == pytest.approx(0.45)
    assert model.predict([STRONGER.key, HALF.key]) == pytest.approx(0.2 + 1.5 * 0.5 * 0.08 + 0.08)
    assert model.predict([CACHE.key, GUIDANCE.key]) == pytest.approx(0.2 + 0.75 * 0.2 + 0.1), "no other pair changes"


def test_the_strongest_pairs_that_could_reach_a_goal_are_measured_and_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, measured = Tuner.__new__(Tuner), []
    tuner.budget = Budget(60.0)
    tuner.record = SimpleNamespace(left_out={})  # pyright: ignore[reportAttributeAccessIssue]

    def measure(parts: dict, baseline: object, purpose: str) -> Measurement:
        measured.append(frozenset(parts))
        return Measurement(parts, purpose, 0.9, psnr=(20.0, 21.0))  # far slower and worse than what was predicted

    monkeypatch.setattr(tuner, "_measure", measure)
    monkeypatch.setattr(tuner, "_tell", lambda *_: None)
    goal = Goal("psnr", 30.0)
    cost, error, keys = CostModel(NETWORK, SINGLES), ErrorModel(goal, SINGLES), [CACHE.key, HALF.key]
    before = cost.predict(keys), error.quality(keys)
    baseline = SimpleNamespace(results=[None, None])
    tuner._pairs(baseline, cost, error, {"goal": goal})  # pyright: ignore[reportArgumentType]
    pairs = [frozenset(pair) for pair in (("step_cache", "compile"), ("step_cache", "guidance_cache"))]
    assert {*pairs, frozenset({"compile", "guidance_cache"})} == set(measured)
    assert cost.predict(keys) > before[0]
    assert error.quality(keys) < before[1]


def test_squared_errors_add_until_a_pair_is_measured() -> None:
    goal = Goal("psnr", 30.0)
    model = ErrorModel(goal, SINGLES)
    keys = [CACHE.key, GUIDANCE.key]
    expected = goal.value(goal.distortion(35.0) + goal.distortion(38.0))
    assert model.predict(keys)[0] == pytest.approx(expected)
    assert model.quality(keys) == pytest.approx(expected + 1)
    found = tuple(goal.value(4 * goal.distortion(value)) for value in model.predict(keys))
    model.learn(keys, together(CACHE, GUIDANCE, share=0.4, psnr=found))
    assert model.predict(keys) == pytest.approx(found)
    assert model.factor(STRONGER.key, GUIDANCE.key) == pytest.approx(4)
    assert model.quality([STRONGER.key, GUIDANCE.key]) < 25, "the factor carries to other strengths"


def test_errors_that_cancel_never_promise_more_than_the_larger_one_allows() -> None:
    model = ErrorModel(Goal("psnr"), SINGLES)
    model.learn([CACHE.key, GUIDANCE.key], together(CACHE, GUIDANCE, share=0.4, psnr=(60.0, 62.0)))
    assert model.quality([CACHE.key, GUIDANCE.key]) < 36 + 6.1


def test_combinations_take_at_most_one_strength_of_each_technique() -> None:
    found = [frozenset(keys) for keys in combinations_of(SINGLES)]
    assert len(found) == len(set(found)) == 3 * 2 * 2 - 1
    assert not any({CACHE.key, STRONGER.key} <= keys for keys in found)


def test_warm_up_is_paid_back_by_what_each_request_saves() -> None:
    one = Measurement({"compile": True}, "single", share=0.75, warm_up=10.0)
    assert one.requests_until_gain(2.0) == pytest.approx(20)
    assert Measurement({"compile": True}, "single", share=1.2, warm_up=10.0).requests_until_gain(2.0) == float("inf")
    assert Measurement.from_dict(one.to_dict()) == one
