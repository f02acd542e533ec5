"""Published methods as combinations of gate, forecaster and region; their constants are data files.

Each preset takes the parameters of `data/defaults.json` under its name. Decisions and forecasts are those of the
methods' own implementations (tests hold some of them to 1e-6); what differs is that the step is known, not counted,
and that branches never share tensors.
"""

from __future__ import annotations

from sampling.step_cache.constants import data
from sampling.step_cache.engine import PRESETS, StepCache, preset
from sampling.step_cache.forecasters import FoCa, Forecaster, Gram, Newton, Reuse, Taylor, TrajectoryAlignment
from sampling.step_cache.gates import (
    Budget,
    FirstBlock,
    InputRate,
    Interval,
    MagnitudeDrift,
    ModulatedInput,
    Probe,
    Speculative,
)
from sampling.step_cache.profile import Profile
from sampling.step_cache.regions import Blocks, Modules, Output, region_of

__all__ = ["PRESETS", "StepCache"]  # with all presets in place


@preset
def budget(budget: float, profile: Profile | str | None, fill: str, guidance: float | None, check: bool) -> StepCache:
    """Compute the best steps within a budget of calls; forecast the others from the two computed before them.

    What is forecast, the network's output or what its blocks add, is what the profile was calibrated for.

    Args:
        budget: largest fraction of calls that are computed.
        profile: of the model, or a file of one, see `calibrate_budget`.
        fill: "gram" (least squares by the profile), "newton" (a line in sigma) or "reuse".
        guidance: scale of the runs; None is that of the calibration.
        check: whether to refuse networks that the profile was not measured on.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget {budget} is outside (0, 1]: it is the fraction of calls that are computed")
    if profile is None:
        raise ValueError(
            "the preset 'budget' needs a profile of the model: calibrate_budget(pipeline, prompts) makes one"
        )
    found = profile if isinstance(profile, Profile) else Profile.load(profile)
    forecasters: dict[str, Forecaster] = {"newton": Newton(1), "reuse": Reuse(), "gram": Gram(found)}
    if fill not in forecasters:
        raise ValueError(f"fill {fill!r} is not known; use one of {', '.join(forecasters)}")
    gate = Budget(found, budget, fill, guidance, check)  # pyright: ignore[reportArgumentType]
    return StepCache(gate, forecasters[fill], region_of(found.region))


@preset
def fora(every: int, first: int) -> StepCache:
    """Make FORA (arXiv 2407.01425): reuse attention and feed-forward outputs of every `every`-th step."""
    return StepCache(Interval(every, first), Reuse(), Modules())


@preset
def fbcache(threshold: float) -> StepCache:
    """Make the first-block cache of diffusers' `FirstBlockCacheConfig`."""
    return StepCache(FirstBlock(threshold), Reuse(), Blocks(head=1))


@preset
def dbcache(
    threshold: float,
    head: int,
    tail: int,
    warmup: int,
    max_skips: int | None,
    max_skipped: int | None,
    order: int | None,
) -> StepCache:
    """Make the dual-block cache of cache-dit's `DBCacheConfig`; with an `order`, its TaylorSeer calibrator too.

    Args:
        threshold: of the head's movement.
        head: blocks at the beginning that always run (Fn).
        tail: blocks at the end that always run (Bn).
        warmup: steps at the beginning that are computed.
        max_skips: skips in a row.
        max_skipped: skips in a run.
        order: of the Taylor series; None is reuse.
    """
    forecaster = Reuse() if order is None else Taylor(order)
    gate = FirstBlock(threshold, max_skipped, strict=True)
    return StepCache(gate, forecaster, Blocks(head, tail), warmup=warmup, max_skips=max_skips)


@preset
def teacache(threshold: float, model: str | None, coefficients: tuple[float, ...] | None) -> StepCache:
    """Make TeaCache (arXiv 2411.19108).

    Args:
        threshold: sum of the movements at which a step is computed.
        model: whose published polynomial to take, a key of `data/teacache.json`.
        coefficients: a polynomial instead, highest power first; (1, 0) takes the movements as they are.
    """
    found = _published("teacache", "coefficients", model, coefficients)
    return StepCache(ModulatedInput(threshold, found), Reuse(), Blocks(head=0), warmup=1, tail=1)


@preset
def magcache(
    threshold: float, max_skips: int, retention: float, model: str | None, ratios: tuple[float, ...] | None
) -> StepCache:
    """Make MagCache as in diffusers' `MagCacheConfig`.

    Args:
        threshold: sum of the drifts at which a step is computed.
        max_skips: skips in a row.
        retention: fraction of the steps at the beginning that are computed.
        model: whose published ratios to take, a key of `data/magcache.json`.
        ratios: ratios instead, e.g. `Profile.magnitude_ratios()`.
    """
    found = _published("magcache", "ratios", model, ratios)
    return StepCache(MagnitudeDrift(found, threshold, max_skips, retention), Reuse(), Blocks(head=0))


@preset
def easycache(threshold: float, warmup: int) -> StepCache:
    """Make EasyCache (arXiv 2507.02860): reuse the difference of output and input."""
    return StepCache(InputRate(threshold), Reuse(), Output(minus_input=True), warmup=warmup, tail=1)


@preset
def dicache(threshold: float, depth: int, retention: float) -> StepCache:
    """Make DiCache (arXiv 2508.17356): probe the first `depth` blocks, blend the two newest residuals."""
    return StepCache(Probe(threshold), TrajectoryAlignment(), Blocks(head=depth), warmup=retention, tail=1)


@preset
def taylorseer(every: int, first: int, order: int, patterns: tuple[str, ...] | None) -> StepCache:
    """Make TaylorSeer as in diffusers' `TaylorSeerCacheConfig` with explicit modules.

    Args:
        every: distance of computed steps.
        first: steps at the beginning that are computed.
        order: of the series.
        patterns: whole names of the modules; None is all attention and feed-forward layers.
    """
    region = Modules(None if patterns is None else tuple(patterns))
    return StepCache(Interval(every, first, offset=first + 1), Taylor(order), region)


@preset
def hicache(every: int, first: int, order: int, damping: float, patterns: tuple[str, ...] | None) -> StepCache:
    """Make HiCache (arXiv 2508.16984): as TaylorSeer, with scaled Hermite polynomials."""
    region = Modules(None if patterns is None else tuple(patterns))
    return StepCache(Interval(every, first, offset=first + 1), Taylor(order, damping), region)


@preset
def foca(every: int, first: int) -> StepCache:
    """Make FoCa (arXiv 2508.16211): at an interval, anchored two-step forecasts."""
    return StepCache(Interval(every, first, offset=first + 1), FoCa(), Blocks(head=0))


@preset
def speca(base: float, decay: float, shortest: int, longest: int, first: int, order: int) -> StepCache:
    """Make SpeCa (arXiv 2509.11628): Taylor forecasts until the last block, which always runs, disagrees."""
    gate = Speculative(base, decay, shortest, longest)
    return StepCache(gate, Taylor(order), Blocks(head=0, tail=1, verify=True), warmup=first)


def _published(file: str, kind: str, model: str | None, given: tuple[float, ...] | None) -> tuple[float, ...]:
    """Return constants that are given, or those published for a model."""
    if given is not None:
        return tuple(given)
    known = data(file)[kind]
    if model not in known:
        raise ValueError(
            f"{file} has published {kind} for {', '.join(known)}, not for {model!r}: name one of them as model=, or "
            f"pass {kind}="
        )
    return tuple(known[model])
