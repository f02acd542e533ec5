"""What makes one request faster: a step cache for denoising, a search among candidates, and what they report."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from apps.service.option_values import MAIN_PARAMETERS, StepCache
from apps.service.request_error import RequestError

logger = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True, slots=True)
class RunningCache:
    """A step cache on a pipeline, or none.

    Attributes:
        mechanism: a `sampling.step_cache.StepCache`.
        preset: its name.
    """

    mechanism: Any = None
    preset: str = ""

    def strip(self) -> str:
        """Return a letter for each step so far: C computed, a dot forecast; empty without a cache."""
        branches = [] if self.mechanism is None else list(self.mechanism.decisions().values())
        steps = branches[0] if branches else {}
        return "".join("C" if steps[step] else "." for step in sorted(steps))


@contextmanager
def step_cache(pipe: Any, wish: StepCache | None) -> Generator[RunningCache]:
    """Attach a step cache for one call.

    Args:
        pipe: with its scheduler in place.
        wish: what was asked for; None attaches nothing.

    Raises:
        ValueError: an unknown preset, a parameter out of range, or a network that it can't be attached to.
    """
    if wish is None:
        yield RunningCache()
        return
    if wish.preset not in MAIN_PARAMETERS:
        raise RequestError(
            "choice",
            f"There is no such step cache; choose among {', '.join(MAIN_PARAMETERS)}.",
            field="step_cache",
            value=wish.preset,
            choices=", ".join(MAIN_PARAMETERS),
        )
    from dit.runtime.attachment import AttachError
    from sampling.step_cache import StepCache as Mechanism

    knob = MAIN_PARAMETERS[wish.preset]
    amount = None if wish.amount is None else round(wish.amount) if knob == "every" else wish.amount
    params: dict[str, Any] = {} if amount is None else {knob: amount}
    if wish.preset == "budget":
        from pipelines.step_cache import find_profile

        try:
            params["profile"] = find_profile(pipe)
        except ValueError as error:  # which names the model's folder
            raise RequestError(
                "cache.profile",
                "The step cache 'budget' needs a profile, and this model has none; choose another step cache.",
            ) from error
    mechanism = Mechanism.preset(wish.preset, **params)
    try:
        with mechanism.attach(pipe):
            yield RunningCache(mechanism, wish.preset)
    except AttachError as error:  # of the first call too, where the streams of the network are seen
        raise RequestError(
            "cache.fit", f"The step cache {wish.preset!r} doesn't fit this model: {error}.", value=wish.preset
        ) from error


def search_argument(method: str, candidates: int | None, grids: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the argument of a next-scale call that searches among candidates.

    Args:
        method: see `TTSConfig`.
        candidates: images to pay for: `best_of` generates so many, the others spend their tokens as they see fit. None
            is 4 for `best_of`, and the published schedule for the others.
        grids: rows and columns of the model's scales.
    """
    from dit.layers.scales import token_counts
    from sampling.inference_search import TTSConfig

    if method == "best_of":
        return {"search": TTSConfig(method=method, batch_sizes=candidates or 4)}
    if candidates is None:
        return {"search": TTSConfig(method=method)}
    return {"search": TTSConfig.for_cost(candidates, token_counts(grids), method=method)}


def describe(pipe: Any, cache: RunningCache, output: Any = None, request: Any = None) -> str:
    """Say what accelerators and searches did in a call; what was asked for and did nothing is also logged as a warning.

    Args:
        pipe: the call has just ended.
        cache: its step cache, still attached.
        output: what it returned.
        request: what was asked for, any of `apps.service.requests`.

    Returns:
        A line for people; empty if there is nothing to say.
    """
    told = []
    strip = cache.strip()
    if "." in strip:
        told.append(f"{strip.count('.')} of {len(strip)} steps forecast")
    kept = getattr(pipe, "kv_report", None)
    if kept is not None:
        told.append(
            f"KV {kept.policy}: {100 * kept.share:.0f} % of {kept.full_bytes / MIB:.1f} MiB kept, "
            f"peak {kept.peak_bytes / MIB:.1f} MiB"
        )
    told += [_found(one) for one in getattr(output, "search", None) or ()]
    idle = list(_idle(pipe, cache, output, request))
    for line in idle:
        logger.warning("%s", line)
    return ", ".join([*told, *idle])


def _idle(pipe: Any, cache: RunningCache, output: Any, request: Any) -> Generator[str]:
    """Each accelerator and search that was asked for and did nothing, with the reason."""
    if cache.mechanism is not None and "." not in cache.strip():
        yield f"the step cache {cache.preset!r} skipped no step: {cache.mechanism.why_inactive()}"
    policy, kept = getattr(request, "kv_policy", None), getattr(pipe, "kv_report", None)
    if policy not in (None, "full"):
        if kept is None:
            yield f"the KV policy {policy!r} dropped nothing: the call kept no keys and values"
        elif kept.share >= 1:
            budget = getattr(request, "kv_budget", None)
            yield (
                f"the KV policy {policy!r} dropped nothing: "
                + (f"all tokens fit the kv_budget {budget:g}" if budget is not None else "all tokens fit its budget")
            )
    method = getattr(request, "search", None)
    if method and not getattr(output, "search", None):
        yield f"the search {method!r} did nothing: the pipeline reports no candidates"


def _found(result: Any) -> str:
    """What a search found for one prompt: the fit of the finished candidates, and what it cost."""
    first, rewards = len(result.selections[0].pictures), [f"{float(reward):.2f}" for reward in result.rewards[:4]]
    last = f"best fits {rewards[0]}" + (f", next {', '.join(rewards[1:])}" if rewards[1:] else "")
    return f"search: {len(result.rewards)} of {first} candidates finished, {last}, {result.token_cost:.2f} x the tokens"
