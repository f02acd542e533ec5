"""What the tuner tries: each technique in several strengths, as parts of an `AccelerationConfig`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from shutil import which
from typing import Any

import torch

from dit.attention import attention_backend_table
from dit.runtime.hooks import find_networks
from pipelines.acceleration.parts import PLAN_FILE
from pipelines.acceleration.switch import is_next_scale
from pipelines.tuning.conditions import Conditions
from sampling.sigma_schedule import SigmaSchedule, scheduler_of

FEW_STEPS = 5
"""Models of fewer steps get no step cache: a distilled model's steps differ too much to forecast one of another."""
PATTERN_TOKENS = 512
"""Sequences of fewer tokens get no pattern: choosing pairs takes longer than computing all."""
BUDGETS = (0.07, 0.1, 0.14, 0.18, 0.22, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
"""Shares of computed steps."""

TECHNIQUES = (
    "step_cache", "compile", "guidance_cache", "quantization", "attention", "next_scale", "kv_cache", "decoder_tiling",
    "offload",
)  # fmt: skip
"""All that may be tried; which of them are depends on the pipeline."""
LATER = {"compile": 1, "fbcache": 2, "taylorseer": 2, "attention": 2, "quantization": 2}
"""Techniques and ladders that begin so many rounds later, in case the time is short: they gain less, or take long."""

Ladders = dict[str, list[Any]]
"""Values of a part, from strong to weak, by the name of their ladder."""


@dataclass(frozen=True)
class Candidate:
    """One technique in one strength.

    Attributes:
        technique: the part's name; combinations take one candidate of each.
        parts: of an `AccelerationConfig`, plain values.
        ladder: candidates of one ladder go from strong to weak: each is slower than the one before, and nearer to the
            plain run.
    """

    technique: str
    parts: Mapping[str, Any] = field(hash=False)
    ladder: str = ""

    @property
    def key(self) -> str:
        """Text that is the same for the same parts."""
        return key_of(self.parts)


@dataclass(frozen=True)
class Offer:
    """What can be tried on a pipeline, and what can't.

    Attributes:
        candidates: in the order in which they are measured.
        left_out: technique -> why none of it is tried.
    """

    candidates: tuple[Candidate, ...]
    left_out: Mapping[str, str]


def key_of(parts: Mapping[str, Any]) -> str:
    """Return text that is the same for the same parts, in any order."""
    return json.dumps(parts, sort_keys=True)


def offer(
    pipe: Any, conditions: Conditions, saves_memory: bool, profiles: Sequence[str | None], tokens: int | None
) -> Offer:
    """Return what can be tried on a pipeline, the strongest of each ladder first.

    Args:
        pipe: called once before, so that its scheduler has timesteps.
        conditions: how it is called.
        saves_memory: whether techniques that save memory and take time are worth a try.
        profiles: files of profiles for budgets of the step cache; None is the one in the model's folder.
        tokens: of a sequence of the network; None if not known.
    """
    left_out: dict[str, str] = {}
    found: dict[str, Ladders] = {
        "step_cache": _step_caches(conditions, profiles, left_out),
        "compile": {"blocks": [True] if _compiles(pipe, left_out) else []},
        "guidance_cache": _guidance_caches(pipe, conditions, left_out),
        "quantization": _each(["w8a8", "int8:w8a8", *(["w4a8"] if saves_memory else [])]),
        "attention": _attention(pipe, tokens, left_out),
    }
    if is_next_scale(pipe):
        for name in ("step_cache", "guidance_cache"):
            found[name] = {}
            left_out[name] = "the pipeline generates scale by scale"
        found |= {"next_scale": _next_scale(len(pipe.info().grids)), "kv_cache": _kv_caches(pipe, left_out)}
    if saves_memory:
        found |= {name: _each(values) for name, values in _memory_savers(pipe, conditions, left_out).items()}
    else:
        left_out["decoder_tiling"] = left_out["offload"] = "no memory goal: these save memory and take time"
    ladders = [_rungs(technique, name, values) for technique, all_ in found.items() for name, values in all_.items()]
    rounds = zip_longest(*ladders)
    return Offer(tuple(one for row in rounds for one in row if one is not None), left_out)


def _rungs(technique: str, name: str, values: Iterable[Any]) -> list[Candidate | None]:
    """Return the candidates of a ladder by the round in which they are measured."""
    made = [Candidate(technique, {technique: value}, f"{technique}: {name}") for value in values]
    return [*[None] * LATER.get(name, LATER.get(technique, 0)), *made]


def _each(values: Iterable[Any]) -> Ladders:
    """Return values that say nothing of each other: a ladder each."""
    return {key_of({"": value}): [value] for value in values}


def _step_caches(conditions: Conditions, profiles: Sequence[str | None], left_out: dict[str, str]) -> Ladders:
    steps = conditions.steps or 0
    if steps < FEW_STEPS:
        left_out["step_cache"] = f"{steps} steps differ too much to forecast one of another"
        return {}
    counts = sorted({max(2, round(share * steps)) for share in BUDGETS})
    found: Ladders = {}
    for profile in profiles:
        named = {} if profile is None else {"profile": profile}
        found[f"budget {profile}"] = [
            {"preset": "budget", "params": {"budget": round(count / steps, 4), **named}}
            for count in counts
            if count < steps
        ]
    found["fbcache"] = [{"preset": "fbcache", "params": {"threshold": value}} for value in (0.3, 0.2, 0.1)]
    found["taylorseer"] = [{"preset": "taylorseer", "params": {"every": every}} for every in (4, 3, 2)]
    return found


def _guidance_caches(pipe: Any, conditions: Conditions, left_out: dict[str, str]) -> Ladders:
    if conditions.guidance is None or conditions.guidance <= 1:
        left_out["guidance_cache"] = "calls have no unconditional branch"
        return {}
    found: Ladders = {"every": [{"every": count} for count in (6, 4, 3, 2) if count <= (conditions.steps or 0) // 2]}
    scheduler = scheduler_of(pipe)
    if scheduler is None or getattr(scheduler, "timesteps", None) is None:
        left_out["guidance_cache (intervals)"] = "the pipeline has no scheduler with noise levels"
        return found
    sigmas = sorted(SigmaSchedule.of(scheduler).sigmas)
    middle = [sigmas[round(share * (len(sigmas) - 1))] for share in (0.25, 0.5, 0.75)]
    found["none at high noise"] = [{"interval": [0.0, level]} for level in middle]
    found["none at low noise"] = [{"interval": [level, sigmas[-1]]} for level in reversed(middle)]
    return found


def _attention(pipe: Any, tokens: int | None, left_out: dict[str, str]) -> Ladders:
    network = next(iter(find_networks(pipe).values()))
    parameter = next((one for one in network.parameters() if one.is_floating_point()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = getattr(pipe, "_execution_device", None) or pipe.device
    found: list[Any] = []
    for name, backend in attention_backend_table().items():
        is_plain = name in {"native", "reference"} or "varlen" in name or name.startswith("_native_math")
        if not is_plain and not backend.can_run(device, dtype, mask=True, call=not backend.compiles):
            found.append({"backend": name})
    if is_next_scale(pipe):
        return _each(found)
    if tokens is None or tokens < PATTERN_TOKENS:
        left_out["attention (patterns)"] = f"sequences have {tokens} tokens, patterns pay from {PATTERN_TOKENS}"
        return _each(found)
    folder = getattr(pipe, "name_or_path", None)
    plan = [{"plan": "model"}] if folder and (Path(folder) / PLAN_FILE).is_file() else []
    pooled = [{"pattern": "pooled", "density": share, "dense_first": 0.2} for share in (0.15, 0.25, 0.35, 0.5)]
    return {**_each([*found, *plan]), "pooled": pooled}


def _compiles(pipe: Any, left_out: dict[str, str]) -> bool:
    """Return whether the blocks of the network can be compiled here."""
    networks = find_networks(pipe).values()
    if not any(getattr(network, "_repeated_blocks", None) for network in networks):
        left_out["compile"] = "the network doesn't name its repeated blocks"
        return False
    if torch.device(pipe.device).type == "cpu" and not any(map(which, ("g++", "c++", "clang++"))):
        left_out["compile"] = "there is no C++ compiler"
        return False
    return True


def _next_scale(scales: int) -> Ladders:
    last = scales - 1
    both = {"unguided": [last - 1, last], "prune": {str(last): 0.5}}
    return {
        "unguided": [{"unguided": list(range(first, scales))} for first in range(max(last - 2, 1), scales)],
        "prune": [{"prune": {str(last): share}} for share in (0.7, 0.5, 0.3)],
        "skip": [{"skip_last": count} for count in (2, 1) if count < last],
        "both": [both, {"unguided": [last], "prune": {str(last): 0.3}}],
    }


def _kv_caches(pipe: Any, left_out: dict[str, str]) -> Ladders:
    if pipe.kv_profile is None:
        left_out["kv_cache (scalekv)"] = "the model has no profile of its keys; pipe.calibrate_kv makes one"
        budgets = [{"policy": "streaming", "budget": share} for share in (0.25, 0.5)]
    else:
        budgets = [{"policy": "scalekv", "budget": share} for share in (0.1, 0.25, 0.5)]
    return {"budgets": budgets, "int8": [{"policy": "full", "dtype": "int8"}]}


def _memory_savers(pipe: Any, conditions: Conditions, left_out: dict[str, str]) -> dict[str, list[Any]]:
    vae = getattr(pipe, "vae", None)
    found: dict[str, list[Any]] = {"decoder_tiling": [], "offload": []}
    if isinstance(getattr(vae, "use_tiling", None), bool):
        found["decoder_tiling"] = [{"tiles": True}]
    else:
        left_out["decoder_tiling"] = "the decoder has no tiles, and slices are for several images at a time"
    if conditions.device == "cpu":
        left_out["offload"] = "the pipeline runs on the CPU, where its weights have to be"
    else:
        found["offload"] = ["model", "group"]
    return found
