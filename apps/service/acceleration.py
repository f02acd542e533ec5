"""What makes one request faster: its `AccelerationConfig`, applied for a call, and what it and a search did."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from apps.service.compute_profiles import PROFILES
from apps.service.option_values import MAIN_PARAMETERS
from apps.service.reports import TEXTS
from apps.service.request_error import RequestError
from apps.service.requests import AnyRequest
from pipelines.acceleration import AccelerationConfig, AccelerationError, AccelerationHandle, PartReport, Reason
from pipelines.acceleration.parts import AttentionPart, DecoderTilingPart, StepCachePart

logger = logging.getLogger(__name__)

MIB = 2**20
DENSE_FIRST = 0.2
"""Fraction of the steps that stay dense under a pattern: they decide what is seen."""


def config_of(
    request: AnyRequest, can_tile: bool, is_quantized: bool = False, profile: Mapping[str, Any] | None = None
) -> AccelerationConfig:
    """Return all that a request asks for as one value: its `acceleration`, and the options that are short for a part.

    Args:
        request: with defaults resolved.
        can_tile: whether the decoder of the model can work in tiles.
        is_quantized: whether the model is; then the report says what its layers did.
        profile: parts that the profile of the request means, see `apps.service.speed_profiles`.

    Raises:
        RequestError: an unknown step cache, or parts that can't go together.
    """
    parts: dict[str, Any] = dict(profile or {})
    if request.acceleration is not None:
        parts |= request.acceleration.parts
    cache = getattr(request, "step_cache", None)
    if cache is not None:
        if cache.preset not in MAIN_PARAMETERS:
            choices = ", ".join(MAIN_PARAMETERS)
            message = f"There is no such step cache; choose among {choices}."
            raise RequestError("choice", message, field="step_cache", value=cache.preset, choices=choices)
        parts["step_cache"] = StepCachePart.of(cache.preset, cache.amount)
    if request.attention is not None:
        parts["attention"] = AttentionPart(backend=request.attention)
    pattern = getattr(request, "attention_pattern", None)
    if pattern is not None:
        parts["attention"] = _sparse_attention(pattern, getattr(request, "attention_density", None), request.attention)
    if request.quantization is not None:
        parts["quantization"] = request.quantization
    elif is_quantized:
        parts.setdefault("quantization", {})
    if request.memory is not None and "decoder_tiling" not in parts:
        wanted = PROFILES[request.memory]
        if wanted.tiles and (can_tile or wanted.offload == "none"):
            parts["decoder_tiling"] = DecoderTilingPart()
    with refusing():
        return AccelerationConfig.from_dict(parts)


def _sparse_attention(pattern: str, density: float | None, backend: str | None) -> dict[str, Any]:
    """Return the fields of an attention part.

    Raises:
        RequestError: a backend is chosen too, which a plan would replace.
    """
    if backend is not None:
        refused = AccelerationError(
            "refused.together",
            first="attention",
            second="attention_pattern",
            reason="a pattern computes with kernels of its own, and dense steps with the network's",
        )
        raise RequestError("acceleration", str(refused), cause=refused)
    if pattern == "plan":
        return {"plan": "model"}
    return {"pattern": pattern, "dense_first": DENSE_FIRST, **({} if density is None else {"density": density})}


@contextmanager
def accelerated(pipe: Any, config: AccelerationConfig) -> Generator[AccelerationHandle]:
    """Apply an acceleration for one call.

    Args:
        pipe: with its scheduler in place.
        config: of the request.

    Raises:
        RequestError: the pipeline can't have a part; some are only known from the first call, where the streams of a
            network are seen.
    """
    from dit.runtime.hooks import AttachError

    with refusing():
        handle = config.apply(pipe)
    with handle:
        try:
            yield handle
        except AttachError as error:
            hint = "; choose another step cache, such as taylorseer" if "step_cache" in config.parts else ""
            refused = AccelerationError(
                "refused.not_attached",
                part=", ".join(config.parts),
                pipeline=type(pipe).__name__,
                reason=f"{error}{hint}",
            )
            raise RequestError("acceleration", str(refused), cause=refused) from error


@contextmanager
def refusing() -> Generator[None]:
    """Turn refusals of an acceleration into errors of the request."""
    try:
        yield
    except AccelerationError as error:
        raise RequestError("acceleration", str(error), cause=error) from error


def step_strip(handle: AccelerationHandle) -> str:
    """Return a letter for each step so far: C computed, a dot forecast; empty without a step cache."""
    mechanism = handle.mechanism("step_cache")
    branches = [] if mechanism is None else list(mechanism.decisions().values())
    steps = branches[0] if branches else {}
    return "".join("C" if steps[step] else "." for step in sorted(steps))


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


def reports_on(
    pipe: Any, handle: AccelerationHandle, output: Any, request: AnyRequest, offload: str = "none"
) -> tuple[PartReport, ...]:
    """Return what accelerators and searches did in a call; what was asked for and did nothing is also logged.

    Args:
        pipe: the call has just ended.
        handle: the acceleration, still applied.
        output: what the call returned.
        request: what was asked for.
        offload: what the model was loaded with, a word of `pipelines.loading.offload`.
    """
    found = list(handle.report().parts)
    if "kv_cache" not in handle.parts:
        found += _on_kv_cache(pipe, request)
    found += _on_search(output, request)
    if offload != "none" and request.memory is not None:
        found.append(PartReport("offload", "offload", {"mode": offload, "device": str(pipe.device)}, True))
    if request.memory is not None and PROFILES[request.memory].tiles and "decoder_tiling" not in handle.parts:
        idle = Reason("why.no_tiles")
        values = {"tiled": 0, "decodes": 0, "sliced": 0}
        found.append(PartReport("decoder_tiling", "decoder_tiling", values, False, (idle,)))
    for one in found:
        if not one.is_active:
            logger.warning("%s", one.text(TEXTS))
    return tuple(found)


def _on_kv_cache(pipe: Any, request: AnyRequest) -> Generator[PartReport]:
    """Report what was kept of the history."""
    kept, policy = getattr(pipe, "kv_report", None), getattr(request, "kv_policy", None)
    budget = getattr(request, "kv_budget", None)
    asked = policy not in (None, "full")
    if kept is None:
        if asked:
            values = {"policy": policy, "budget": 1.0 if budget is None else budget}
            yield PartReport("kv_cache", "kv_cache.before", values, False, (Reason("why.no_keys"),))
        return
    values = {
        "policy": kept.policy,
        "share": kept.share,
        "peak_mib": kept.peak_bytes / MIB,
        "full_mib": kept.full_bytes / MIB,
    }
    is_idle = asked and kept.share >= 1
    reasons = (Reason("why.all_kept", {"budget": 1.0 if budget is None else budget}),) if is_idle else ()
    yield PartReport("kv_cache", "kv_cache", values, not is_idle, reasons)


def _on_search(output: Any, request: AnyRequest) -> Generator[PartReport]:
    """Report what a search found for each prompt: the fit of the finished candidates, and what it cost."""
    method, results = getattr(request, "search", None), getattr(output, "search", None) or ()
    if method and not results:
        yield PartReport("search", "search.asked", {"method": method}, False, (Reason("why.no_candidates"),))
    for result in results:
        values = {
            "finished": len(result.rewards),
            "first": len(result.selections[0].images),
            "fits": [f"{float(reward):.2f}" for reward in result.rewards[:4]],
            "cost": result.token_cost,
        }
        yield PartReport("search", "search", values, True)
