"""Calibrated budgets: the dynamic program is exact, profiles travel in sigma and are refused elsewhere."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dit.runtime.artifacts import ArtifactError, ArtifactHeader
from dit.runtime.hooks import AttachError
from pipelines.step_cache import attach_cache, make_cache, parse_cache
from sampling.step_cache import Profile, StepCache, calibrate_budget
from sampling.step_cache.calibration import GramObserver
from sampling.step_cache.profile import interpolation
from sampling.step_cache.schedule import Errors, remaining_error, shortest_path
from tests.families.networks import tiny_transformer
from tests.families.tiny import tiny_pipeline
from tests.runtime.counting import count_calls
from tests.runtime.truth import guided_call
from tests.step_cache.loops import levels


def header() -> ArtifactHeader:
    return ArtifactHeader("step_cache_profile", "a", "w", "s", (1, 4, 4), ())


def curve(sigmas: list[float], width: int = 40, seed: int = 0) -> np.ndarray:
    """Predictions that change smoothly along a run, some quickly at its beginning, (N, width)."""
    rng = np.random.default_rng(seed)
    waves, phases = rng.uniform(0, 6, width), rng.uniform(0, 6, width)
    return np.sin(np.outer(np.asarray(sigmas) ** 2, waves) + phases)


def profile(steps: int = 12, seed: int = 0) -> Profile:
    sigmas = levels(steps)
    values = curve(sigmas, seed=seed)
    return Profile(header(), tuple(sigmas), {"cond,cond": values @ values.T / values.shape[1]})


def slow_errors(gram: np.ndarray, sigmas: list[float], anchors: tuple[int, ...]) -> float:
    """The sum of errors of a mask, step by step as the definition says."""
    total, before = 0.0, []
    for step, sigma in enumerate(sigmas):
        if step in anchors:
            before = [step, *before]
            continue
        weights = np.zeros(len(sigmas))
        if len(before) == 1:
            weights[before[0]] = 1
        else:
            ahead = (sigma - sigmas[before[0]]) / (sigmas[before[0]] - sigmas[before[1]])
            weights[before[0]], weights[before[1]] = 1 + ahead, -ahead
        weights[step] -= 1
        length = sigma - (sigmas[step + 1] if step + 1 < len(sigmas) else 0.0)
        left = 0.5 / np.sqrt((0.5 * (1 - sigma)) ** 2 + sigma**2)  # of the error at the end, for Gaussian data
        total += length * left * np.sqrt(max(weights @ gram @ weights, 0))
    return total


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_shortest_path_beats_every_other_mask(count: int) -> None:
    made = profile(9)
    errors = Errors.of(made.gram(), made.sigmas, "newton")
    found = tuple(shortest_path(errors, count))
    costs = {
        (0, *others): slow_errors(made.gram(), list(made.sigmas), (0, *others))
        for others in itertools.combinations(range(1, 9), count - 1)
    }
    assert costs[found] == pytest.approx(min(costs.values()), rel=1e-9)


def test_least_squares_never_errs_more_than_the_line() -> None:
    made = profile(12)
    line, best = (Errors.of(made.gram(), made.sigmas, fill).size for fill in ("newton", "gram"))
    p, a, j = np.nonzero(line > 1e-3)
    later = (a > p) & (j > a)
    assert later.sum() > 100
    assert (best[p, a, j][later] <= line[p, a, j][later] * 1.02 + 1e-3).all()


@pytest.mark.parametrize("budget", [0.2, 0.25, 0.35, 0.5, 0.99, 1.0])
def test_mask_keeps_the_budget_and_begins_with_a_computed_step(budget: float) -> None:
    mask = profile(28).mask((), budget)
    assert mask[0]
    assert sum(mask) == int(28 * budget + 1e-6)


def test_mask_spends_steps_where_predictions_bend() -> None:
    """Twice the steps fall on the half of the run where predictions turn as on the half where they hardly move."""
    sigmas = levels(24, shift=1.0)
    still = np.where(np.asarray(sigmas) > 0.5, 0.5, sigmas)
    values = curve(list(still * 4))
    made = Profile(header(), tuple(sigmas), {"cond,cond": values @ values.T / values.shape[1]})
    mask = made.mask((), 0.4)
    assert sum(mask[12:]) >= 2 * sum(mask[:12])


def test_errors_shrink_as_the_flow_of_gaussian_data_says() -> None:
    """Follow two latents that differ by an error down the exact velocity of data with deviation 0.5."""
    for begin in (0.95, 0.6, 0.2):
        steps, error = 4000, 1.0
        for sigma in np.linspace(begin, 0, steps, endpoint=False):
            spread = (0.5 * (1 - sigma)) ** 2 + sigma**2  # variance of the latents; the velocity is its half slope
            error -= begin / steps * (sigma - 0.25 * (1 - sigma)) / spread * error
        assert remaining_error([begin])[0] == pytest.approx(error, rel=2e-3)
    noisy = remaining_error([14.0, 1.0])  # a model of the noise: latents are data + sigma noise
    assert noisy == pytest.approx([0.5 / np.hypot(0.5, 14.0), 0.5 / np.hypot(0.5, 1.0)])


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.5])
def test_fifty_steps_are_planned_in_a_fraction_of_a_second(budget: float) -> None:
    """Counted in calls of functions: loops of Python over pairs or triples of steps would need far more."""
    made = profile(50)
    errors = Errors.of(made.gram(), made.sigmas, "gram")
    assert count_calls(lambda: shortest_path(errors, int(50 * budget))) < 50**2 / 2
    assert count_calls(lambda: made.mask((), budget)) < 2 * 50**3
    assert count_calls(lambda: made.mask((), budget)) < 50  # kept for the next run


def test_interpolation_is_exact_for_cubics() -> None:
    known, wanted = levels(9), levels(14, shift=2.0)
    matrix = interpolation(known, wanted)
    cubic = lambda x: 1 + x - 2 * x**2 + 3 * x**3  # noqa: E731
    inside = [i for i, level in enumerate(wanted) if known[-1] <= level]
    np.testing.assert_allclose((matrix @ cubic(np.asarray(known)))[inside], cubic(np.asarray(wanted))[inside])
    np.testing.assert_allclose(interpolation(known, known), np.eye(9), atol=1e-12)
    with pytest.raises(ValueError, match="fall strictly"):
        interpolation([1.0, 0.5, 0.5], [0.7])


def test_another_step_count_gets_a_mask_like_the_one_calibrated_for_it() -> None:
    coarse, fine = profile(28), profile(50)
    carried, own = coarse.mask(fine.sigmas, 0.3), fine.mask((), 0.3)
    gram, sigmas = fine.gram(), list(fine.sigmas)
    chosen = [tuple(np.flatnonzero(mask)) for mask in (carried, own)]
    evenly = tuple(sorted(set(np.round(np.linspace(0, 49, 15)).astype(int))))
    costs = [slow_errors(gram, sigmas, anchors) for anchors in (*chosen, evenly)]
    assert costs[0] < 0.5 * (costs[1] + costs[2]), "not much better than evenly spaced steps"


def test_files_are_small_and_come_back(tmp_path: Path) -> None:
    made = profile(50)
    pairs = ("cond,cond", "uncond,uncond", "cond,uncond")
    rich = Profile(made.header, made.sigmas, dict.fromkeys(pairs, made.grams["cond,cond"]), 4.0, 2)
    rich.save(tmp_path / "profile.safetensors")
    assert (tmp_path / "profile.safetensors").stat().st_size < 100_000
    loaded = Profile.load(tmp_path / "profile.safetensors")
    assert loaded.sigmas == rich.sigmas
    assert loaded.mask((), 0.3) == rich.mask((), 0.3)
    assert loaded.guidance == 4.0


# ------------------------------------------------------------------------- with pipelines


def test_gram_of_a_pipeline_is_that_of_its_outputs() -> None:
    pipe = tiny_pipeline("text_dit")
    outputs: list[torch.Tensor] = []
    arguments = guided_call(pipe, "text_dit", guided=True)
    arguments = {name: value for name, value in arguments.items() if name not in ("prompt", "generator")}
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0].clone()))
    made = calibrate_budget(pipe, ["a red apple"], 6, **{**arguments, "num_inference_steps": 6})
    handle.remove()
    uncond, cond = torch.stack(outputs).double().chunk(2, dim=1)  # (N, 1, C, H, W)
    guided = (uncond + made.guidance * (cond - uncond)).flatten(1)
    expected = guided @ guided.T / guided.shape[1]
    assert made.guidance == 3.0
    np.testing.assert_allclose(made.gram(), expected.numpy(), rtol=1e-4)
    assert made.magnitude_ratios()[1] == pytest.approx((expected[1, 1] / expected[0, 0]).sqrt().item(), rel=1e-4)


def test_sketches_keep_inner_products() -> None:
    observer = GramObserver(width=4096)
    values = torch.randn(6, 20_000, generator=torch.Generator().manual_seed(0))
    values += values.mean(0)
    sketched = observer._sketched(values)
    assert sketched.shape == (6, 4096)
    torch.testing.assert_close(sketched @ sketched.T, values @ values.T, rtol=0.1, atol=1200.0)


@pytest.mark.parametrize("name", ["flux", "wan", "dit", "text_dit"])
def test_budget_runs_as_planned(name: str) -> None:
    pipe = tiny_pipeline(name)
    arguments = {**guided_call(pipe, name, guided=True), "num_inference_steps": 10}
    first = arguments.pop("prompt", None) or arguments.pop("class_labels", None)
    known = {"generator": None}
    settings = {key: value for key, value in arguments.items() if key not in known}
    made = calibrate_budget(pipe, [first], **settings)

    def paint() -> torch.Tensor:
        key = "class_labels" if name == "dit" else "prompt"
        return torch.as_tensor(pipe(**{key: first}, **settings, generator=torch.Generator().manual_seed(5))[0])

    plain = paint()
    with StepCache.preset("budget", budget=0.4, profile=made).attach(pipe) as attached:
        cached = paint()
        report = attached.report()
    expected = "".join("C" if computed else "." for computed in made.mask((), 0.4))
    assert set(report["strip"].values()) == {expected}
    assert report["cost"] == pytest.approx(0.4)
    assert report["inactive"] == {}
    with StepCache.preset("budget", budget=1.0, profile=made).attach(pipe):
        assert torch.equal(paint(), plain)
    assert not torch.equal(cached, plain)


def test_a_foreign_profile_is_refused() -> None:
    pipe, other = tiny_pipeline("text_dit"), tiny_transformer("text_dit", seed=1)
    arguments = guided_call(pipe, "text_dit", guided=True)
    arguments = {name: value for name, value in arguments.items() if name not in ("prompt", "generator")}
    made = calibrate_budget(pipe, ["a red apple"], **arguments)
    with pytest.raises(ArtifactError, match="other weights"):
        StepCache.preset("budget", budget=0.5, profile=made).attach(other)
    with pytest.raises(ArtifactError, match="another architecture"):
        StepCache.preset("budget", budget=0.5, profile=made).attach(tiny_pipeline("wan"))
    StepCache.preset("budget", budget=0.5, profile=made, check=False).attach(other).detach()
    with pytest.raises(ValueError, match="outside"):
        StepCache.preset("budget", budget=0, profile=made)
    with pytest.raises(ValueError, match="needs a profile of the model"):
        StepCache.preset("budget")


# ---------------------------------------------------------------------------------- text


def test_caches_by_text() -> None:
    assert parse_cache("budget=0.35") == ("budget", {"budget": 0.35})
    assert parse_cache("fbcache:threshold=0.1") == ("fbcache", {"threshold": 0.1})
    assert parse_cache(" taylorseer ") == ("taylorseer", {})
    assert parse_cache("budget=0.5,profile=a.safetensors")[1]["profile"] == "a.safetensors"
    for wrong in ("magic", "fbcache:threshold", "", "fbcache:=3"):
        with pytest.raises(ValueError, match="not understood"):
            parse_cache(wrong)
    pipe = tiny_pipeline("text_dit")
    with pytest.raises(ValueError, match=r"no step_cache\.safetensors"):
        make_cache(pipe, "budget=0.35")
    with attach_cache(pipe, "taylorseer:every=2") as attached:
        assert attached.report()["region"] == "Modules"
        with pytest.raises(AttachError):
            attach_cache(pipe, "easycache")


def test_builtin_profile_fits_the_builtin_model() -> None:
    from pipelines import load_pipeline

    pipe = load_pipeline("stickers", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(0)]
    plain = pipe("a red apple on yellow", generator=noise, output_type="pt").images
    with attach_cache(pipe, "budget=0.5") as attached:
        cached = pipe("a red apple on yellow", generator=[torch.Generator().manual_seed(0)], output_type="pt").images
        assert attached.report()["cost"] == 0.5
    assert (plain - cached).square().mean().item() < 1e-4  # above 40 dB
