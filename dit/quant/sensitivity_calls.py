"""Calls of a network that stand for the parts of a run: recorded once, made again with some layers quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.runtime.families import call_family_of
from dit.runtime.hooks import Attachment, Mechanism
from dit.runtime.noise_levels import remaining_error
from dit.runtime.stages import Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, current_step, step_scope

Group = Literal["cross", "content", "temporal"]
GROUPS: tuple[Group, ...] = ("cross", "content", "temporal")
"""Groups of layers by what they decide, each with a measure of its own; see `dit.quant.sensitivity`."""


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """A call of the network.

    Attributes:
        context: of its step.
        args: positional arguments.
        kwargs: the others.
    """

    context: StepContext
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a run, which one step stands for.

    Attributes:
        sigma: noise level of that step; NaN where it isn't known.
        weight: squared error at the end of the run for a squared error of 1 of all predictions in this part.
        runs: calls of that step by run; guidance by two calls has two.
    """

    sigma: float
    weight: float
    runs: tuple[tuple[RecordedCall, ...], ...]


class CallRecorder(Mechanism):
    """Keeps what a network is called with at the middle step of each part of a run; it changes nothing.

    The step comes from the step context: our pipelines set it, for those of diffusers attach
    `sampling.step_tracker.StepTracker`.

    Args:
        segments: parts of a run; shorter runs have one a step.
        components: which network; None means the one that denoises.
    """

    name: ClassVar[str] = "call_recorder"
    stage: ClassVar[Stage] = Stage.OBSERVER

    def __init__(self, segments: int, components: Sequence[str] | None = None) -> None:
        self.segments, self.components = segments, components
        self._calls: dict[int, list[RecordedCall]] = {}  # by segment
        self._sigmas: dict[int, float] = {}  # by step
        self._lengths: set[int] = set()

    def install(self, attachment: Attachment) -> None:
        """Watch the calls of the network."""
        model = next(iter(attachment.models.values()))
        attachment.pre_hook(model, torch.compiler.disable(partial(self._keep, attachment)))

    def _keep(self, attachment: Attachment, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        here = current_step()
        if here is None:
            attachment.skip("no step context")
            return
        self._sigmas[here.step] = here.sigma
        self._lengths.add(here.num_steps)
        parts = min(self.segments, here.num_steps)
        number = here.step * parts // here.num_steps
        if here.step == int((number + 0.5) * here.num_steps / parts):
            self._calls.setdefault(number, []).append(RecordedCall(here, _copied(args), _copied(kwargs)))

    def result(self) -> tuple[Segment, ...]:
        """Return the parts of the runs, in their order.

        An error of the prediction at a step of length d is worth d times what the rest of the run leaves of it
        (`remaining_error`); errors of different steps are taken to be independent. Without noise levels steps count
        alike.

        Raises:
            ValueError: no step was seen, or runs differ in their number of steps.
        """
        if len(self._lengths) != 1:
            found = f"runs of {sorted(self._lengths)} steps were seen" if self._lengths else "no step is known"
            raise ValueError(
                f"{found}: generate runs of one length, and attach sampling.step_tracker.StepTracker() to pipelines of "
                "diffusers first"
            )
        steps, parts = max(self._lengths), len(self._calls)
        levels = [self._sigmas.get(step, math.nan) for step in range(steps)]
        worth = np.full(steps, 1 / steps)
        if all(map(math.isfinite, levels)):
            worth = (np.abs(np.diff(levels, append=0.0)) * remaining_error(levels)) ** 2  # (steps,)
        found = []
        for number in sorted(self._calls):
            weight = sum(worth[step] for step in range(steps) if step * parts // steps == number)
            runs: dict[int, list[RecordedCall]] = {}
            for call in self._calls[number]:
                runs.setdefault(call.context.run, []).append(call)
            sigma = self._calls[number][0].context.sigma
            found.append(Segment(sigma, float(weight), tuple(tuple(one) for one in runs.values())))
        return tuple(found)


def _copied(value: Any) -> Any:
    """Return a value with copies of its tensors, which samplers may change in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    return type(value)(_copied(one) for one in value) if type(value) in (list, tuple) else value


@dataclass(frozen=True, eq=False)
class Replay:
    """Predictions of a network for recorded calls.

    Attributes:
        model: the network, as it is called.
        pipeline: that called it.
        guidance: scale.
        segments: of the runs.
    """

    model: nn.Module
    pipeline: Any
    guidance: float
    segments: Sequence[Segment] = field(default_factory=tuple)

    def predictions(self, calls: Sequence[RecordedCall], *, grad: bool = False) -> dict[str, Tensor]:
        """Call the network once more.

        Args:
            calls: of one step.
            grad: whether to keep what gradients need.

        Returns:
            Predictions by branch of guidance, float32, (B, ...).
        """
        found: dict[str, Tensor] = {}
        for call in calls:
            with step_scope(call.context), torch.enable_grad() if grad else torch.no_grad():
                output = self.model(*call.args, **call.kwargs)
                tensor = output if isinstance(output, Tensor) else output[0]
                tensor = torch.stack(list(tensor)) if isinstance(tensor, list | tuple) else tensor
                found |= self._by_branch(call.context.branch, tensor.float())
        return found

    def _by_branch(self, branch: str, tensor: Tensor) -> dict[str, Tensor]:
        """Divide a batch that holds all branches, where the family says in which order they are."""
        family = call_family_of(unwrap(self.model))
        layout = family.branches(self.pipeline) or family.branches()
        if branch != "all" or layout is None or layout.kind != "batched" or len(tensor) % len(layout.order):
            return {branch: tensor}
        return dict(zip(layout.order, tensor.chunk(len(layout.order)), strict=True))

    def guided(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the guided prediction; that of the only branch without guidance.

        Args:
            parts: predictions by branch.
        """
        if {"cond", "uncond"} <= set(parts):
            return parts["uncond"] + self.guidance * (parts["cond"] - parts["uncond"])
        return next(iter(parts.values()))

    def measured(self, parts: Mapping[str, Tensor], group: Group) -> Tensor:
        """Return what the measure of a group looks at, see `dit.quant.sensitivity`.

        Args:
            parts: predictions by branch.
            group: of layers.
        """
        if group == "cross" and {"cond", "uncond"} <= set(parts):
            return parts["cond"] - parts["uncond"]
        whole = self.guided(parts)
        if group == "temporal" and whole.ndim == 5 and whole.shape[2] > 1:
            return whole[:, :, 1:] - whole[:, :, :-1]  # (B, C, T - 1, H, W)
        return high_pass(whole)


def high_pass(latents: Tensor) -> Tensor:
    """Take the mean of 3 x 3 neighbours off latents.

    Args:
        latents: (B, C, H, W) or (B, C, T, H, W), float32. Others are returned as they are: the place of a token in
            (B, N, C) isn't known here.
    """
    if latents.ndim == 4:
        return latents - F.avg_pool2d(latents, 3, 1, 1, count_include_pad=False)
    if latents.ndim == 5:
        frames = latents.transpose(1, 2).flatten(0, 1)  # (B T, C, H, W)
        return high_pass(frames).unflatten(0, (len(latents), -1)).transpose(1, 2)
    return latents
