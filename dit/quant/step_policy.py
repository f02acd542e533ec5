"""StepPolicy: at which steps of a run activations keep 16 bits, over the same quantized weights.

The first steps decide what is seen, and errors of the last ones are corrected by no other step. A policy is a number of
steps at either end of a run, as diffusers stores it (`quantization_config.runtime.diffusion_step_policy`,
diffusers#14664), or ranges of noise levels, which hold for any number of steps. `dit.quant.step_choice` finds one by
calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, TypeGuard

import torch
from torch import nn

from dit.quant.linear import QuantLinear
from dit.runtime.hooks import AttachError, Attachment, Mechanism
from dit.runtime.stages import Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, current_step

SCHEMA_VERSION = 1
WINDOWS, LEVELS = "first_last_n", "noise_levels"
"""Types of policies; the second is ours, which diffusers does not read."""
INDEX_SPACE = {WINDOWS: "denoising_loop_iteration", LEVELS: "sigma"}
FULL, NATIVE = "a16", "native"
"""Modes of steps in diffusers' words: 16-bit activations, and those of the checkpoint."""
REQUIRED = (
    "schema_version", "type", "index_space", "scope", "default_mode", "first_steps", "last_steps", "overlap", "reasoner"
)  # fmt: skip
"""Fields without which diffusers reads no policy."""
MOST_STEPS = 10_000


@dataclass(frozen=True)
class StepPolicy:
    """At which steps activations keep 16 bits.

    Attributes:
        first: steps at the beginning of a run.
        last: steps at its end.
        overlap: whether steps that are among both keep them too.
        levels: ranges (highest, lowest) of noise levels, both included, whose steps keep them as well.
        reasoner: "a16" or "native": precision of a language model in the same network; kept as it was read.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    first: int = 0
    last: int = 0
    overlap: bool = True
    levels: tuple[tuple[float, float], ...] = ()
    reasoner: str = NATIVE

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_STEPS:
                raise ValueError(f"{name} is {value!r}; use a number of steps from 0 to {MOST_STEPS}")
        for one in self.levels:
            if len(one) != 2 or not all(math.isfinite(level) and level >= 0 for level in one) or one[0] < one[1]:
                raise ValueError(f"levels holds {one!r}; use pairs (highest, lowest) of noise levels, 0 or more")
        if self.reasoner not in (FULL, NATIVE):
            raise ValueError(f"reasoner is {self.reasoner!r}; use {FULL!r} or {NATIVE!r}")

    def is_full(self, step: int, steps: int, sigma: float = math.nan) -> bool:
        """Return whether a step keeps 16-bit activations; a run of one step never does, as in diffusers.

        Args:
            step: from 0.
            steps: of the run.
            sigma: noise level, for policies by level; NaN is in no range.
        """
        if steps == 1:
            return False
        if any(low <= sigma <= high for high, low in self.levels):
            return True
        begins, ends = step < self.first, step >= steps - self.last
        return (begins or ends) and (self.overlap or not (begins and ends))

    def to_dict(self) -> dict[str, Any]:
        """Return it as `diffusion_step_policy`."""
        kind = LEVELS if self.levels else WINDOWS
        ranges = [{"from": high, "to": low, "mode": FULL} for high, low in self.levels]
        return {
            "schema_version": SCHEMA_VERSION,
            "type": kind,
            "index_space": INDEX_SPACE[kind],
            "scope": ["transformer"],
            "default_mode": NATIVE,
            "first_steps": {"count": self.first, "mode": FULL},
            "last_steps": {"count": self.last, "mode": FULL},
            "overlap": FULL if self.overlap else NATIVE,
            "reasoner": self.reasoner,
            **({"ranges": ranges} if ranges else {}),
        }

    @classmethod
    def from_dict(cls, policy: Mapping[str, Any]) -> StepPolicy:
        """Read a `diffusion_step_policy`; like diffusers, refuse what is incomplete.

        Args:
            policy: its fields.

        Raises:
            ValueError: a field is missing or has a value that isn't known; the message names it.
        """
        if not isinstance(policy, Mapping):
            raise ValueError(f"diffusion_step_policy is {policy!r:.80}, expected an object of its fields")
        missing = [name for name in REQUIRED if name not in policy]
        if missing:
            raise ValueError(f"diffusion_step_policy lacks {', '.join(missing)}; write it with StepPolicy.to_dict()")
        kind = policy["type"]
        if not isinstance(kind, str) or kind not in INDEX_SPACE:
            raise ValueError(f"diffusion_step_policy: type is {kind!r:.60}, expected {WINDOWS!r} or {LEVELS!r}")
        known = {"schema_version": SCHEMA_VERSION, "index_space": INDEX_SPACE[kind], "default_mode": NATIVE}
        for name, value in known.items():
            if policy[name] != value:
                raise ValueError(f"diffusion_step_policy: {name} is {policy[name]!r:.60}, expected {value!r}")
        if policy["scope"] != ["transformer"]:
            raise ValueError(f"diffusion_step_policy: scope is {policy['scope']!r:.60}, expected ['transformer']")
        if policy["overlap"] not in (FULL, NATIVE):
            raise ValueError(
                f"diffusion_step_policy: overlap is {policy['overlap']!r:.60}, expected {FULL} or {NATIVE}"
            )
        first, last = _count(policy, "first_steps"), _count(policy, "last_steps")
        return cls(first, last, policy["overlap"] == FULL, _ranges(policy, kind), policy["reasoner"])


def _count(policy: Mapping[str, Any], name: str) -> int:
    """Return the steps of a window."""
    window = policy[name]
    if not isinstance(window, Mapping) or window.get("mode") not in (FULL, NATIVE):
        raise ValueError(f"diffusion_step_policy: {name} is {window!r:.80}, expected a count and the mode {FULL!r}")
    count = window.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST_STEPS:
        raise ValueError(f"diffusion_step_policy: the count of {name} is {count!r:.40}, expected 0 to {MOST_STEPS}")
    return count if window["mode"] == FULL else 0


def _ranges(policy: Mapping[str, Any], kind: str) -> tuple[tuple[float, float], ...]:
    """Return the ranges of noise levels that keep 16 bits."""
    given = policy.get("ranges", [])
    if kind == WINDOWS and not given:
        return ()
    if kind == WINDOWS or not isinstance(given, list) or not given:
        raise ValueError(f"diffusion_step_policy: ranges is {given!r:.80}; the type {LEVELS!r} has some, others none")
    found: list[tuple[float, float]] = []
    for one in given:
        high, low = (one.get("from"), one.get("to")) if isinstance(one, Mapping) else (None, None)
        if not _is_number(high) or not _is_number(low) or one.get("mode") != FULL:
            raise ValueError(
                f"diffusion_step_policy: ranges holds {one!r:.80}, expected from, to and the mode {FULL!r}"
            )
        found.append((float(high), float(low)))
    return tuple(found)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class PrecisionByStep(Mechanism):
    """Have quantized layers keep 16-bit activations at the steps of a policy, in all branches of guidance alike.

    The step comes from the step context: our pipelines set it, for those of diffusers attach
    `sampling.step_tracker.StepTracker`. Calls without one are quantized, and counted in the report.

    Args:
        policy: at which steps.

    Attributes:
        steps: that were called, of all runs.
        full: those with 16-bit activations.
    """

    name: ClassVar[str] = "precision_by_step"
    stage: ClassVar[Stage] = Stage.QUANTIZATION

    def __init__(self, policy: StepPolicy) -> None:
        self.policy, self.steps, self.full = policy, 0, 0
        self._last: tuple[int, int] | None = None
        self._strip: dict[int, bool] = {}

    def install(self, attachment: Attachment) -> None:
        """Watch the calls of the networks that have quantized layers.

        Raises:
            AttachError: none has any.
        """
        enter: Any = torch.compiler.disable(self._enter)
        for model in attachment.models.values():
            bare: Any = unwrap(model)
            layers = quantized_layers_in(bare)
            if not layers:
                continue
            attachment.on_detach(partial(set_full_precision, layers, False))
            if is_next_scale(bare):
                attachment.replace(bare, "step", _preceded(bare.step, partial(enter, attachment, layers)))
            else:
                attachment.pre_hook(model, lambda *_, layers=layers: enter(attachment, layers))
        if not any(quantized_layers_in(model) for model in attachment.models.values()):
            raise AttachError("precision by step needs quantized layers: quantize the network first")

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return how many steps there were, at how many activations kept 16 bits, and those of the newest run.

        "strip" has one letter a step: F full precision, q quantized, a space not called.
        """
        letters = {True: "F", False: "q", None: " "}
        strip = "".join(letters[self._strip.get(step)] for step in range(max(self._strip, default=-1) + 1))
        return {"steps": self.steps, "full_precision_steps": self.full, "strip": strip}

    def _enter(self, attachment: Attachment, layers: list[QuantLinear]) -> None:
        here = current_step()
        if here is None:
            attachment.skip("no step context")
        set_full_precision(layers, here is not None and self._is_full(here))

    def _is_full(self, here: StepContext) -> bool:
        is_full = self.policy.is_full(here.step, here.num_steps, here.sigma)
        if (here.run, here.step) != self._last:  # the branches of a step count once
            if self._last is None or here.run != self._last[0]:
                self._strip = {}
            self._last = here.run, here.step
            self._strip[here.step] = is_full
            self.steps += 1
            self.full += is_full
        return is_full


def quantized_layers_in(network: nn.Module) -> list[QuantLinear]:
    """Return the quantized layers of a network, each once.

    Args:
        network: wrapped or not.
    """
    return [one for one in unwrap(network).modules() if isinstance(one, QuantLinear)]


def set_full_precision(layers: list[QuantLinear], is_full: bool) -> None:
    """Have layers leave their inputs as they are, or quantize them.

    Args:
        layers: of a network.
        is_full: whether activations keep 16 bits.
    """
    for layer in layers:
        layer.full_precision = is_full


def is_next_scale(network: nn.Module) -> bool:
    """Return whether a network is called scale by scale, through `step`, and not with latents and a timestep."""
    return callable(getattr(type(unwrap(network)), "step", None))


def _preceded(function: Callable[..., Any], before: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that calls another one first."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        before()
        return function(*args, **kwargs)

    return called
