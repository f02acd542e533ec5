"""`tessera bench speed-up`: what `speed_up` reaches on a built-in model, beside what one would put together by hand.

Steps, size, scheduler and guidance are those of the model's usual calls, in its faster data type. Prompts are new to
the tuner. A setting counts if the mean PSNR of its images to those of the plain run is at least the goal. Compared are:
the tuned profile; each of its parts alone, and step caches alone in several strengths; fewer steps of good solvers;
and, where they are installed, caches of cache-dit and diffusers, alone and on a network that SDNQ or torchao quantized.

The time of a candidate is that of requests for one image, with text encoder and decoder, in turns with the plain run
(process time with one thread). Of each kind the fastest that reaches the goal is told.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from apps.benchmarks import baselines
from apps.benchmarks.next_scale import Asked
from apps.benchmarks.quantization_quality import Subject, likeness
from apps.benchmarks.quantization_quality_rivals import rivals as quantizers
from apps.environment import describe_machine
from dit.quant.roles import quantizable_layers
from dit.runtime.timing import measure
from pipelines import AccelerationConfig, speed_up
from pipelines.call_defaults import setting_call_defaults

GOAL = 30.0
"""Decibels."""
PROFILE = "balanced"
"""Of the tuner; its goal is `GOAL`."""
BUDGETS = (0.5, 0.375, 0.25, 0.2, 0.15, 0.125)
"""Of step caches alone."""
OTHERS: dict[str, dict[str, Any]] = {
    "guidance cache, every 2": {"guidance_cache": {"every": 2}},
    "guidance cache, every 3": {"guidance_cache": {"every": 3}},
    "quantization w8a8": {"quantization": "w8a8"},
}
"""Techniques that a tuned profile may not have, each alone."""
MASKS = ((1, 2), (2, 2), (1, 3), (2, 3), (1, 4), (2, 4), (1, 6))
"""Of cache-dit: steps computed first, and of how many later ones one is computed."""
STEPS_KEPT = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25)
"""Shares of the steps, for solvers."""
QUANTIZERS = ("SDNQ int8", "torchao int8, int8 activations")


@dataclass(frozen=True)
class Way:
    """A way to be faster.

    Attributes:
        kind: rows of one kind compete among themselves.
        name: with its settings.
        on: puts it on a pipeline for a `with` block.
    """

    kind: str
    name: str
    on: Callable[[Any], AbstractContextManager[Any]]


def bench_speed_up(asked: Asked) -> dict[str, Any]:
    """Measure one model; about a quarter of an hour with one thread."""
    subject = Subject.load(asked)
    # one batch: caches of others keep no state of texts of another length
    subject = replace(subject, batch=max(len(subject.requests), 1))
    dtype = _faster_dtype(subject, 1 if asked.smoke else 3)
    subject.pipe.to(dtype)
    subject.pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        rows = _rows(subject, asked.repeats)
    return {
        "machine": describe_machine(torch.device(subject.pipe.device), dtype),
        "model": asked.model or "stickers",
        "prompts": len(subject.requests),
        "steps": _steps(subject.pipe),
        "missing": baselines.missing(),
        "tables": {f"fastest of each kind at {GOAL:g} dB": best_of(rows), "all": rows},
    }


def _faster_dtype(subject: Subject, repeats: int) -> torch.dtype:
    """Return the data type in which the plain pipeline is faster, by copies of it."""
    kinds = (torch.float32, torch.bfloat16)
    pipes = {kind: copy.deepcopy(subject.pipe).to(kind) for kind in kinds}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    times = measure({str(kind): lambda pipe=pipe: _request(subject, pipe) for kind, pipe in pipes.items()}, repeats)
    return min(kinds, key=lambda kind: times.timings[str(kind)].process_min)


def _request(subject: Subject, pipe: Any) -> Any:
    """Make one request."""
    return pipe(subject.requests[0].prompt, generator=torch.Generator().manual_seed(0), output_type="np")


def _steps(pipe: Any) -> int:
    """Return how many steps a usual call makes."""
    return len(pipe.scheduler.timesteps)


def _rows(subject: Subject, repeats: int) -> list[dict[str, Any]]:
    """Compare all ways with the plain run."""
    plain = subject.generate()
    rows = []
    for way in _ways(subject, repeats == 1):
        try:
            with way.on(subject.pipe):
                near = likeness(subject.generate(), plain)
            gain = _gain(subject, way, repeats)
        except Exception as error:  # of other libraries and of parts that a model can't have; its row says so
            rows.append({"shape": f"{way.kind}: {way.name}", "failed": f"{type(error).__name__}: {error}"[:160]})
            continue
        rows.append(
            {
                "shape": f"{way.kind}: {way.name}",
                "gain": round(gain, 2),
                "PSNR, dB": round(statistics.mean(near), 2),
                "at the goal, %": round(100 * sum(one >= GOAL for one in near) / len(near), 1),
            }
        )
    return rows


def _gain(subject: Subject, way: Way, repeats: int) -> float:
    """Return how many times as fast a request is: the median over rounds in turns with the plain run."""
    ratios = []
    for _ in range(repeats):
        plain = _seconds(subject)
        with way.on(subject.pipe):
            fast = _seconds(subject)
        ratios.append(plain / fast)
    return statistics.median(ratios)


def _seconds(subject: Subject) -> float:
    """Return the processor time of a request: the least of two, after one that doesn't count."""
    return measure({"request": lambda: _request(subject, subject.pipe)}, 2, 1).timings["request"].process_min


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the fastest row of each kind that reaches the goal.

    Args:
        rows: with a shape `kind: name`.
    """
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        kind = row["shape"].partition(":")[0]
        if row.get("PSNR, dB", 0.0) >= GOAL and row["gain"] > best.get(kind, {"gain": 0.0})["gain"]:
            best[kind] = row
    return [{**row, "shape": f"best {row['shape']}"} for row in best.values()]


# ------------------------------------------------------------------------------- ways


def _ways(subject: Subject, smoke: bool) -> Iterator[Way]:
    """Yield all ways."""
    with speed_up(subject.pipe, profile=PROFILE) as handle:
        tuned = handle.config
    yield Way("speed_up", f"{PROFILE} ({', '.join(tuned.parts)})", tuned.apply)
    for name, part in tuned.parts.items():
        yield Way("one technique", name, AccelerationConfig.from_dict({name: part.model_dump()}).apply)
    for budget in BUDGETS[: 1 if smoke else None]:
        config = AccelerationConfig.from_dict({"step_cache": {"preset": "budget", "params": {"budget": budget}}})
        yield Way("one technique", f"step cache, budget {budget:g}", config.apply)
    for name, part in OTHERS.items():
        yield Way("one technique", name, AccelerationConfig.from_dict(part).apply)
    steps = _steps(subject.pipe)
    counts = sorted({max(2, round(share * steps)) for share in STEPS_KEPT} - {steps})
    for candidate in baselines.fewer_steps(counts[: 1 if smoke else None]):
        yield Way("fewer steps", f"{candidate.method} {candidate.settings}", _with_steps(candidate))
    yield from _by_hand(subject, steps, smoke)


def _with_steps(candidate: baselines.Candidate) -> Callable[[Any], AbstractContextManager[Any]]:
    """Return what has calls of a pipeline make fewer steps of another solver."""

    @contextmanager
    def on(pipe: Any) -> Iterator[None]:
        with candidate.on(pipe), setting_call_defaults(pipe, {"num_inference_steps": candidate.steps}):
            yield

    return on


def _by_hand(subject: Subject, steps: int, smoke: bool) -> Iterator[Way]:
    """Yield what others' libraries can do, in all combinations."""
    caches: list[tuple[str, Callable[[Any], AbstractContextManager[Any]]]] = [("", lambda _: nullcontext())]
    masks = [(first, every) for first, every in MASKS if first < steps]
    for candidate in baselines.of_cache_dit(steps, masks) + baselines.of_diffusers_without_calibration():
        caches.append((f"{candidate.method} {candidate.settings}", candidate.on))
    found = {one.name: one for one in quantizers() if one.name in QUANTIZERS}
    names = [role.name for role in quantizable_layers(subject.pipe.transformer)]
    for title in ("", *found):
        for cache, on in caches[: 2 if smoke else None]:
            if title or cache:
                yield Way("by hand", " + ".join(filter(None, (title, cache))), _together(found.get(title), names, on))


def _together(quantizer: Any, names: list[str], cache: Callable[[Any], AbstractContextManager[Any]]) -> Any:
    """Return what puts another library's network and cache on a pipeline; the network is quantized once."""
    made: dict[int, Any] = {}

    @contextmanager
    def on(pipe: Any) -> Iterator[None]:
        plain = pipe.transformer
        if quantizer is not None and id(plain) not in made:
            made[id(plain)] = quantizer.quantize(copy.deepcopy(plain), names, lambda network: None)
        pipe.transformer = made.get(id(plain), plain)
        try:
            with cache(pipe):
                yield
        finally:
            pipe.transformer = plain

    return on
