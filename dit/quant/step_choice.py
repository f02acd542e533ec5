"""Choose by calibration at which steps activations keep 16 bits.

A quantized pipeline generates a few prompts, and its network is called twice at each step: with activations quantized
and as they are. The difference of the two predictions is what quantized activations change there; how much of it is
left at the end of the run follows from the length of the step and the noise level. The steps that take away most for
what they cost are kept in 16 bits.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dit.quant.linear import QuantLinear
from dit.quant.step_policy import StepPolicy
from dit.quant.step_precision import is_next_scale, quantized_layers_in, set_full_precision
from dit.runtime.families import call_family_of
from dit.runtime.hooks import AttachError, Attachment, Mechanism
from dit.runtime.noise_levels import remaining_error
from dit.runtime.stages import Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import current_step


@dataclass(frozen=True)
class StepNoise:
    """What quantized activations do to the predictions of a run.

    Attributes:
        sigmas: noise level of each step, (N,); NaN where it isn't known.
        error: mean square of what they change in the guided prediction, (N,).
        signal: mean square of the prediction, (N,).
        slowdown: time of a call with 16-bit activations over that of a quantized one.
    """

    sigmas: tuple[float, ...]
    error: tuple[float, ...]
    signal: tuple[float, ...]
    slowdown: float

    def effects(self) -> np.ndarray:
        """Return each step's share of the squared error at the end of a run, (N,); they sum up to 1.

        Errors of different steps are taken to be independent. Where noise levels aren't known, steps count alike.
        """
        square = np.asarray(self.error, np.float64)
        levels = np.asarray(self.sigmas, np.float64)
        if np.isfinite(levels).all():
            square = square * (np.abs(np.diff(levels, append=0.0)) * remaining_error(self.sigmas)) ** 2
        return square / max(float(square.sum()), 1e-300)

    @property
    def step_cost(self) -> float:
        """Time that 16-bit activations at one step add, as a fraction of a run's time."""
        return max(self.slowdown - 1.0, 0.0) / len(self.error)


@dataclass(frozen=True)
class PolicyChoice:
    """A policy, and what it is expected to do.

    Attributes:
        policy: at which steps activations keep 16 bits.
        noise: what it was chosen by.
        full_steps: those steps of the calibration's runs.
        removed: share of the squared error of quantized activations that it takes away.
        time: that it adds, as a fraction of a run's time.
    """

    policy: StepPolicy
    noise: StepNoise
    full_steps: tuple[int, ...]
    removed: float
    time: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "diffusion_step_policy": self.policy.to_dict(),
            "full_precision_steps": list(self.full_steps),
            "steps": len(self.noise.error),
            "error_removed": self.removed,
            "time_added": self.time,
            "slowdown_of_a_step": self.noise.slowdown,
            "sigmas": list(self.noise.sigmas),
            "share_of_error": self.noise.effects().tolist(),
        }


def choose_policy(
    pipeline: Any,
    prompts: Sequence[Any],
    limit: float = 0.05,
    *,
    windows: bool = True,
    seed: int = 0,
    call: Callable[[Any, Any, int], Any] | None = None,
    **call_kwargs: Any,
) -> PolicyChoice:
    """Find the steps whose activations should keep 16 bits.

    Args:
        pipeline: with quantized layers. Its steps must be known: ours set them, for those of diffusers attach
            `sampling.step_tracker.StepTracker` before.
        prompts: one image or clip is generated for each; two or three are enough.
        limit: time that 16-bit activations may add, as a fraction of a run's time.
        windows: choose steps at both ends of a run, which diffusers can read; False chooses any steps, by noise level.
        seed: of the first prompt; prompt i has `seed + i`.
        call: `call(pipeline, prompt, seed)` generates one; None calls the pipeline with prompt and generator.
        **call_kwargs: of the pipeline's call.

    Raises:
        ValueError: no prompts, a limit below 0, or a pipeline whose steps aren't known.
        AttachError: no network has quantized layers, or it is called scale by scale.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one prompt")
    if not limit >= 0:
        raise ValueError(f"limit is {limit}; use 0 or more, the fraction of a run's time that may be added")
    noise = measure_noise(pipeline, prompts, seed=seed, call=call, **call_kwargs)
    return choose_steps(noise, limit, windows=windows)


def choose_steps(noise: StepNoise, limit: float, *, windows: bool = True) -> PolicyChoice:
    """Choose steps by what was measured; see `choose_policy`.

    Args:
        noise: of a run's steps.
        limit: time that may be added, as a fraction of a run's time.
        windows: choose steps at both ends only.
    """
    effects, steps = noise.effects(), len(noise.error)
    count = steps if noise.step_cost * steps <= limit else int(limit / noise.step_cost + 1e-9)
    if windows or not np.isfinite(noise.sigmas).all():
        totals = {
            (first, count - first): float(effects[:first].sum() + effects[steps - count + first :].sum())
            for first in range(count + 1)
        }
        first, last = max(totals, key=lambda pair: (totals[pair], pair[1]))
        chosen = tuple(step for step in range(steps) if step < first or step >= steps - last)
        policy = StepPolicy(first, last)
    else:
        best = sorted(range(steps), key=lambda step: -effects[step])[:count]
        chosen = tuple(sorted(best))
        policy = StepPolicy(levels=_ranges(noise.sigmas, chosen))
    return PolicyChoice(policy, noise, chosen, float(effects[list(chosen)].sum()), noise.step_cost * len(chosen))


def _ranges(sigmas: Sequence[float], chosen: Sequence[int]) -> tuple[tuple[float, float], ...]:
    """Return ranges of noise levels, to the middle between neighbours, that hold these steps and no others."""
    middles = [(one + other) / 2 for one, other in pairwise(sigmas)]
    highest, lowest = [sigmas[0], *middles], [*middles, 0.0]
    found: list[tuple[float, float]] = []
    for step in chosen:
        if found and found[-1][1] == highest[step]:
            found[-1] = (found[-1][0], lowest[step])
        else:
            found.append((highest[step], lowest[step]))
    return tuple(found)


# ------------------------------------------------------------------------------ measuring


def measure_noise(
    pipeline: Any,
    prompts: Sequence[Any],
    *,
    seed: int = 0,
    call: Callable[[Any, Any, int], Any] | None = None,
    **call_kwargs: Any,
) -> StepNoise:
    """Measure by noise level what quantized activations change in the predictions, and what 16 bits cost.

    Args:
        pipeline: see `choose_policy`.
        prompts: see there.
        seed: see there.
        call: see there.
        **call_kwargs: see there.

    Raises:
        ValueError: the steps aren't known, or runs differ in their number.
        AttachError: see `choose_policy`.
    """
    run, observer = call or partial(_generate, arguments=call_kwargs), ActivationNoise()
    with observer.attach(pipeline) as attachment:
        for number, prompt in enumerate(prompts):
            run(pipeline, prompt, seed + number)
            observer.close(float(getattr(pipeline, "guidance_scale", None) or 1.0))
        if attachment.inactive:
            reasons = "; ".join(f"{reason}: {count} calls" for reason, count in attachment.inactive.items())
            raise ValueError(
                f"the steps of this pipeline aren't known ({reasons}): attach sampling.step_tracker.StepTracker() first"
            )
    return observer.result()


@dataclass
class _Step:
    """What was seen of a step, summed over runs.

    Attributes:
        sigma: noise level.
        error: sum of mean squares.
        signal: likewise.
        count: predictions.
    """

    sigma: float
    error: float = 0.0
    signal: float = 0.0
    count: int = 0


@dataclass
class _Pending:
    """Differences and predictions of a step's branches in the order of their calls."""

    parts: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


class ActivationNoise(Mechanism):
    """Calls a quantized network twice at each step, with activations quantized and as they are; returns the former."""

    name: ClassVar[str] = "activation_noise"
    stage: ClassVar[Stage] = Stage.QUANTIZATION

    def __init__(self) -> None:
        self._steps: dict[int, _Step] = {}
        self._pending: dict[int, _Pending] = {}
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        self._lengths: set[int] = set()

    def install(self, attachment: Attachment) -> None:
        """Wrap the networks that have quantized layers."""
        for component, model in attachment.models.items():
            layers = quantized_layers_in(model)
            if not layers:
                continue
            if is_next_scale(model):
                raise AttachError(
                    f"{component} is called scale by scale and keeps what it has seen, so it can't be called twice; "
                    "choose its steps by hand: StepPolicy(first=..., last=...)"
                )
            attachment.wrap_forward(model, torch.compiler.disable(partial(self._call, attachment, model, layers)))

    def _call(
        self,
        attachment: Attachment,
        model: nn.Module,
        layers: list[QuantLinear],
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        here = current_step()
        if here is None:
            attachment.skip("no step context")
            return forward(*args, **kwargs)
        outputs: dict[bool, Any] = {}
        order = (True, False) if len(self._seconds[True]) % 2 else (False, True)  # neither always finds a warm cache
        try:
            for is_full in order:
                set_full_precision(layers, is_full)
                outputs[is_full], seconds = _timed(forward, args, kwargs)
                self._seconds[is_full].append(seconds)
        finally:
            set_full_precision(layers, False)
        exact = _prediction(outputs[True]).float()
        difference = _prediction(outputs[False]).float() - exact
        self._lengths.add(here.num_steps)
        self._steps.setdefault(here.step, _Step(here.sigma))
        pending = self._pending.setdefault(here.step, _Pending())
        for branch, *part in _by_branch(attachment, model, here.branch, difference, exact):
            pending.parts.setdefault(branch, []).append((part[0], part[1]))
        return outputs[False]

    def close(self, guidance: float) -> None:
        """Sum up a run.

        Args:
            guidance: its scale.
        """
        for number, pending in self._pending.items():
            step = self._steps[number]
            for difference, prediction in _guided(pending.parts, guidance):
                step.error += float(difference.square().mean())
                step.signal += float(prediction.square().mean())
                step.count += 1
        self._pending = {}

    def result(self) -> StepNoise:
        """Return the means over all runs.

        Raises:
            ValueError: no step was seen, or runs differ in their steps.
        """
        numbers = sorted(self._steps)
        if len(self._lengths) != 1 or numbers != list(range(next(iter(self._lengths)))):
            raise ValueError(
                f"steps {numbers} of runs of {sorted(self._lengths)} were called: calibrate runs of one length, "
                "without a step cache"
            )
        steps = [self._steps[number] for number in numbers]
        slowdown = statistics.median(
            full / quick for full, quick in zip(self._seconds[True], self._seconds[False], strict=True)
        )
        return StepNoise(
            tuple(one.sigma for one in steps),
            tuple(one.error / one.count for one in steps),
            tuple(one.signal / one.count for one in steps),
            slowdown,
        )


def _by_branch(
    attachment: Attachment, model: nn.Module, branch: str, *tensors: Tensor
) -> list[tuple[str, Tensor, Tensor]]:
    """Cut tensors (B, ...) of a call that holds all branches, where the family says in which order they are."""
    family = call_family_of(unwrap(model))
    layout = family.branches(attachment.target) or family.branches()
    if branch != "all" or layout is None or layout.kind != "batched" or len(tensors[0]) % len(layout.order):
        return [(branch, tensors[0], tensors[1])]
    parts = [tensor.chunk(len(layout.order)) for tensor in tensors]
    return list(zip(layout.order, *parts, strict=True))


def _guided(parts: Mapping[str, list[tuple[Tensor, Tensor]]], guidance: float) -> list[tuple[Tensor, Tensor]]:
    """Return differences and predictions after guidance; of branches that aren't the usual two each for itself."""
    if set(parts) != {"cond", "uncond"} or len(parts["cond"]) != len(parts["uncond"]):
        return [pair for pairs in parts.values() for pair in pairs]
    return [
        (minus[0] + guidance * (plus[0] - minus[0]), minus[1] + guidance * (plus[1] - minus[1]))
        for plus, minus in zip(parts["cond"], parts["uncond"], strict=True)
    ]


def _timed(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, float]:
    """Call a function; processor time where it works on the CPU, else the clock."""
    on_accelerator = any(isinstance(one, Tensor) and one.device.type == "cuda" for one in (*args, *kwargs.values()))
    clock = time.perf_counter if on_accelerator else time.process_time
    if on_accelerator:
        torch.cuda.synchronize()
    begun = clock()
    output = function(*args, **kwargs)
    if on_accelerator:
        torch.cuda.synchronize()
    return output, max(clock() - begun, 1e-9)


def _prediction(output: Any) -> Tensor:
    """Return the tensor (B, ...) of a network's output."""
    found = output if isinstance(output, Tensor) else output[0]
    return torch.stack(list(found)) if isinstance(found, list | tuple) else found


def _generate(pipeline: Any, prompt: Any, seed: int, arguments: Mapping[str, Any]) -> Any:
    """Generate once; nothing is decoded where the pipeline can leave that out."""
    known = list(inspect.signature(type(pipeline).__call__).parameters)
    name = "prompt" if "prompt" in known else known[1]  # behind self
    is_class = isinstance(prompt, int) and not isinstance(prompt, bool)
    given: dict[str, Any] = {name: [prompt] if is_class else prompt}  # some pipelines take lists of classes only
    if "generator" in known:
        given["generator"] = torch.Generator().manual_seed(seed)
    if "latents" in known and "output_type" in known:
        given["output_type"] = "latent"
    return pipeline(**{**given, **arguments})
