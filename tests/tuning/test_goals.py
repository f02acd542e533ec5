"""Goals as users write them, and the Pareto front."""

import math

import pytest

from pipelines.tuning.front import dominates, pareto_front
from pipelines.tuning.goals import Goal, parse_bytes


def test_goals_are_read() -> None:
    goal = Goal.parse("psnr >= 30.5", 2, "8GB")
    assert goal == Goal("psnr", 30.5, 2, 8 * 10**9)
    assert goal.text() == "psnr>=30.5, latency<=2 s, memory<=8GB"
    assert goal.is_met(30.5, 2.0, 8e9)
    assert not goal.is_met(30.4, 2.0, 8e9)
    assert not goal.is_met(31.0, 2.1, 8e9)
    assert not goal.is_met(31.0, 2.0, 8.1e9)
    assert Goal.parse("ssim>=0.9").metric == "ssim"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quality": "30"}, "psnr>=30"),
        ({"quality": "lpips>=3"}, "psnr>=30"),
        ({"quality": "ssim>=30"}, "from 0 to 1"),
        ({"latency": 0.0}, "above 0"),
        ({"latency": math.nan}, "above 0"),
        ({"memory": "much"}, "8GB"),
        ({"memory": "0GB"}, "8GB"),
    ],
)
def test_wrong_goals_say_what_is_accepted(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        Goal.parse(**given)
    assert repr(next(iter(given.values()))) in str(caught.value)


def test_sizes_have_units() -> None:
    assert parse_bytes("8GiB") == 8 * 2**30
    assert parse_bytes("1.5 MB") == 1_500_000
    assert parse_bytes(4096) == 4096


@pytest.mark.parametrize("metric", ["psnr", "ssim"])
def test_a_distortion_is_a_value_again(metric: str) -> None:
    goal = Goal(metric)  # pyright: ignore[reportArgumentType]
    value = 31.7 if metric == "psnr" else 0.93
    assert goal.value(goal.distortion(value)) == pytest.approx(value)
    assert Goal("psnr").value(0.0) == 100.0


def test_squared_errors_of_equal_size_cost_three_decibels() -> None:
    goal = Goal("psnr")
    assert goal.value(2 * goal.distortion(30.0)) == pytest.approx(30.0 - 10 * math.log10(2))


def test_the_front_holds_what_nothing_dominates() -> None:
    results = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (3.0, 4.0), (4.0, 1.0), (1.0, 5.0)]
    front = pareto_front(results, lambda one: one)
    assert front == [(1.0, 5.0), (2.0, 4.0), (4.0, 1.0)]
    assert all(any(dominates(kept, one) or kept == one for kept in front) for one in results)
    assert not dominates((1.0, 2.0), (1.0, 2.0))
