"""What the tuner tries: each technique in several strengths, as parts of an `AccelerationConfig`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Any

import torch

from dit.attention import attention_backend_table
from dit.runtime.hooks import find_networks
from pipelines.acceleration.on_memory import can_slice
from pipelines.acceleration.parts import PLAN_FILE
from pipelines.acceleration.switch import is_next_scale
from pipelines.tuning.conditions import Conditions
from pipelines.tuning.goals import Goal
from sampling.sigma_schedule import SigmaSchedule, scheduler_of

FEW_STEPS = 5
"""Models of fewer steps get no step cache: a distilled model's steps differ too much to forecast one of another."""
PATTERN_TOKENS = 512
"""Sequences of fewer tokens get no pattern: choosing pairs takes longer than computing all."""
BUDGETS = (0.75, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)
"""Shares of computed steps."""


@dataclass(frozen=True)
class Candidate:
    """One technique in one strength.

    Attributes:
        technique: the part's name; combinations take one candidate of each.
        parts: of an `AccelerationConfig`, plain values.
    """

    technique: str
    parts: Mapping[str, Any] = field(hash=False)

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


def offer(pipe: Any, conditions: Conditions, goal: Goal, profile: str | None, tokens: int | None) -> Offer:
    """Return what can be tried on a pipeline.

    Args:
        pipe: called once before, so that its scheduler has timesteps.
        conditions: how it is called.
        goal: memory brings the techniques that save it.
        profile: file of the profile for budgets of the step cache; None is the one in the model's folder.
        tokens: of a sequence of the network; None if not known.
    """
    left_out: dict[str, str] = {}
    found: dict[str, Iterable[Any]] = {
        "step_cache": _step_caches(conditions, profile, left_out),
        "compile": [True] if _compiles(pipe, left_out) else [],
        "guidance_cache": _guidance_caches(pipe, conditions, left_out),
        "quantization": ["w8a8", "int8:w8a8", *(["w4a8"] if goal.memory else [])],
        "attention": _attention(pipe, tokens, left_out),
    }
    if is_next_scale(pipe):
        for name in ("step_cache", "guidance_cache"):
            found[name] = ()
            left_out[name] = "the pipeline generates scale by scale"
        found |= {"next_scale": _next_scale(len(pipe.info().grids)), "kv_cache": _kv_caches(pipe, left_out)}
    if goal.memory is not None:
        found |= _memory_savers(pipe, conditions, left_out)
    else:
        left_out["decoder_tiling"] = left_out["offload"] = "no memory goal: these save memory and take time"
    made = [Candidate(name, {name: value}) for name, values in found.items() for value in values]
    return Offer(tuple(made), left_out)


def _step_caches(conditions: Conditions, profile: str | None, left_out: dict[str, str]) -> list[Any]:
    steps = conditions.steps or 0
    if steps < FEW_STEPS:
        left_out["step_cache"] = f"{steps} steps differ too much to forecast one of another"
        return []
    counts = sorted({max(2, round(share * steps)) for share in BUDGETS}, reverse=True)
    named = {} if profile is None else {"profile": profile}
    budgets = [
        {"preset": "budget", "params": {"budget": round(count / steps, 4), **named}}
        for count in counts
        if count < steps
    ]
    thresholds = [{"preset": "fbcache", "params": {"threshold": value}} for value in (0.1, 0.2, 0.3)]
    intervals = [{"preset": "taylorseer", "params": {"every": every}} for every in (2, 3, 4)]
    return [*budgets, *thresholds, *intervals]


def _guidance_caches(pipe: Any, conditions: Conditions, left_out: dict[str, str]) -> list[Any]:
    if conditions.guidance is None or conditions.guidance <= 1:
        left_out["guidance_cache"] = "calls have no unconditional branch"
        return []
    every = [{"every": count} for count in (2, 3, 4, 6) if count <= (conditions.steps or 0) // 2]
    try:
        sigmas = sorted(SigmaSchedule.of(scheduler_of(pipe)).sigmas)
    except (AttributeError, ValueError):  # no scheduler, or one without noise levels: no interval can be named
        return every
    middle = [sigmas[round(share * (len(sigmas) - 1))] for share in (0.25, 0.5, 0.75)]
    low = [{"interval": [0.0, level]} for level in reversed(middle)]  # no guidance at high noise
    high = [{"interval": [level, sigmas[-1]]} for level in middle]  # none at low noise
    return [*every, *low, *high]


def _attention(pipe: Any, tokens: int | None, left_out: dict[str, str]) -> list[Any]:
    network = next(iter(find_networks(pipe).values()))
    parameter = next((one for one in network.parameters() if one.is_floating_point()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    device = getattr(pipe, "_execution_device", None) or pipe.device
    found: list[Any] = []
    for name, backend in attention_backend_table().items():
        is_plain = name in {"native", "reference"} or "varlen" in name or name.startswith("_native_math")
        if not is_plain and not backend.can_run(device, dtype, mask=True):
            found.append({"backend": name})
    if is_next_scale(pipe):
        return found
    if tokens is None or tokens < PATTERN_TOKENS:
        left_out["attention (patterns)"] = f"sequences have {tokens} tokens, patterns pay from {PATTERN_TOKENS}"
        return found
    folder = getattr(pipe, "name_or_path", None)
    plan = [{"plan": "model"}] if folder and (Path(folder) / PLAN_FILE).is_file() else []
    pooled = [{"pattern": "pooled", "density": share, "dense_first": 0.2} for share in (0.5, 0.35, 0.25)]
    return [*found, *plan, *pooled]


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


def _next_scale(scales: int) -> list[Any]:
    last = scales - 1
    return [
        {"unguided": [last]},
        {"unguided": [last - 1, last]},
        {"prune": {str(last): 0.3}},
        {"prune": {str(last): 0.5}},
        {"skip_last": 1},
        {"skip_last": 2},
    ]


def _kv_caches(pipe: Any, left_out: dict[str, str]) -> list[Any]:
    if pipe.kv_profile is None:
        left_out["kv_cache (scalekv)"] = "the model has no profile of its keys; pipe.calibrate_kv makes one"
        budgets = [{"policy": "streaming", "budget": share} for share in (0.5, 0.25)]
    else:
        budgets = [{"policy": "scalekv", "budget": share} for share in (0.5, 0.25, 0.1)]
    return [*budgets, {"policy": "full", "dtype": "int8"}]


def _memory_savers(pipe: Any, conditions: Conditions, left_out: dict[str, str]) -> dict[str, list[Any]]:
    vae = getattr(pipe, "vae", None)
    found: dict[str, list[Any]] = {"decoder_tiling": [], "offload": []}
    if isinstance(getattr(vae, "use_tiling", None), bool):
        found["decoder_tiling"] = [{"tiles": True}]
    elif can_slice(pipe):
        found["decoder_tiling"] = [{"tiles": False, "slices": True}]
    else:
        left_out["decoder_tiling"] = "the decoder has neither tiles nor slices"
    if conditions.device == "cpu":
        left_out["offload"] = "the pipeline runs on the CPU, where its weights have to be"
    else:
        found["offload"] = ["model", "group"]
    return found
