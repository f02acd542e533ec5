"""Guidance with fewer calls: only in an interval of noise levels, and with a cached difference between the branches.

Works on any pipeline, diffusers' too, without changing it: where the unconditional call can be left out, the network's
answer for it is made of the conditional one. Guidance with `uncond = cond + d` gives `cond - (scale - 1) d`, so a
difference of zero is no guidance at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit.runtime.families import family_of
from dit.runtime.hooks import Attachment, Mechanism
from dit.runtime.stages import Resource, Stage
from dit.runtime.step_context import StepContext, current_step, step_scope
from sampling.guidance import in_interval
from sampling.step_cache.forecasters import Anchor, Forecaster, Newton
from sampling.step_cache.values import Rebuild, Values, flatten, mix
from sampling.step_tracker import TrackedAttachment


class CachedGuidance(Mechanism):
    """Skip unconditional calls outside an interval of noise levels, and forecast them in between.

    Args:
        interval: lowest and highest sigma with guidance (arXiv 2404.07724; REPA's SiT uses (0, 0.7) of flow time);
            None is everywhere. In sigma it means the same for every step count and shift.
        every: within the interval the unconditional branch is computed at every `every`-th step.
        forecaster: how the difference of the branches is forecast in between.

    Raises:
        ValueError: the interval is empty, or `every` below 1.

    Example:
        >>> with ThriftyGuidance(interval=(0.2, 0.9), every=2).attach(pipe) as guidance:
        ...     pipe("a red apple")
        >>> guidance.report()["uncond_computed"]  # steps
    """

    name = "guidance_cache"
    stage = Stage.GUIDANCE  # above step caches, which see calls of the conditional branch alone
    exclusive = frozenset({Resource.GUIDANCE})

    def __init__(
        self, interval: tuple[float, float] | None = None, every: int = 1, forecaster: Forecaster | None = None
    ) -> None:
        in_interval(0.0, interval)  # raises for an empty one
        if every < 1:
            raise ValueError(f"every is {every}; use 1 (each step) or more")
        self.interval, self.every = interval, every
        self.forecaster = Newton(1) if forecaster is None else forecaster
        self._reset(None)

    def _reset(self, run: int | None) -> None:
        self._run = run
        self._anchors: dict[str, list[Anchor]] = {}
        self._cond: dict[str, tuple[int, Values]] = {}
        self._first: int | None = None
        self._rebuild: Rebuild | None = None
        self.computed: list[int] = []
        self.skipped: list[int] = []

    def attach(self, target: Any) -> Attachment:
        """Attach to a network or pipeline, with a step tracker where the pipeline has none."""
        return TrackedAttachment(self, target)

    def install(self, attachment: Attachment) -> None:
        """Wrap the networks."""
        for component, model in attachment.models.items():
            attachment.wrap_forward(model, partial(self._call, attachment, component, model))

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return at which steps of the newest run the unconditional branch was computed and left out."""
        return {"uncond_computed": list(self.computed), "uncond_skipped": list(self.skipped)}

    def _call(
        self,
        attachment: Attachment,
        component: str,
        model: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        here = current_step()
        if here is None:
            attachment.skip("no step context")
            return forward(*args, **kwargs)
        if here.run != self._run:
            self._reset(here.run)
        if here.branch == "all":
            return self._both(attachment, component, model, here, forward, args, kwargs)
        if here.branch == "uncond":
            return self._uncond(attachment, component, here, forward, args, kwargs)
        output = forward(*args, **kwargs)
        if here.branch == "cond":
            self._cond[component] = here.step, tuple(tensor.clone() for tensor in flatten(output)[0])
        return output

    # ------------------------------------------------------------------ one call for both

    def _both(
        self,
        attachment: Attachment,
        component: str,
        model: nn.Module,
        here: StepContext,
        forward: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        layout = family_of(model).branches(attachment.target) or family_of(model).branches()
        if layout is None or layout.kind != "batched" or set(layout.order) != {"cond", "uncond"}:
            attachment.skip("the order of the branches in the batch is not known")
            return forward(*args, **kwargs)
        cond_first = layout.order[0] == "cond"
        difference = self._difference(attachment, component, here)
        size = 2 * _half_size(model, args, kwargs)
        if difference is None:
            output = forward(*args, **kwargs)
            first, second = _halves(flatten(output)[0], size)
            cond, uncond = (first, second) if cond_first else (second, first)
            self._keep(attachment, component, here, tuple(b - a for a, b in zip(cond, uncond, strict=True)))
            return output
        half = partial(_half, size=size, first=cond_first)
        with step_scope(replace(here, branch="cond")):
            output = forward(*map(half, args), **half(kwargs))
        cond, rebuild = flatten(output)
        uncond = tuple(a + part for a, part in zip(cond, _or_zeros(difference, cond), strict=True))
        first, second = (cond, uncond) if cond_first else (uncond, cond)
        if _is_list(cond, size // 2):  # Z-Image returns a list of samples
            return _with_list(output, [*first, *second])
        return rebuild([torch.cat(pair) for pair in zip(first, second, strict=True)])

    # --------------------------------------------------------------------- two calls

    def _uncond(
        self,
        attachment: Attachment,
        component: str,
        here: StepContext,
        forward: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        step, cond = self._cond.get(component, (-1, ()))
        if step != here.step:
            attachment.skip("the unconditional call comes before the conditional one")
            return forward(*args, **kwargs)
        difference = self._difference(attachment, component, here)
        if difference is None:
            output = forward(*args, **kwargs)
            tensors, self._rebuild = flatten(output)
            self._keep(attachment, component, here, tuple(a - b for a, b in zip(tensors, cond, strict=True)))
            return output
        values = [one + part for one, part in zip(cond, _or_zeros(difference, cond), strict=True)]
        return self._structure(args, kwargs, values)

    def _structure(self, args: tuple, kwargs: dict[str, Any], values: list[Tensor]) -> Any:
        """Return the form in which the caller wants its output."""
        if self._rebuild is not None:
            return self._rebuild(values)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        is_dict = kwargs.get("return_dict", True)
        return Transformer2DModelOutput(sample=values[0]) if is_dict else tuple(values)  # pyright: ignore

    # --------------------------------------------------------------------- differences

    def _difference(self, attachment: Attachment, component: str, here: StepContext) -> Values | None:
        """Return the difference to use; empty for none at all; None if the branch must be computed."""
        if not in_interval(here.sigma, self.interval):
            self.skipped.append(here.step)
            return ()
        if self._first is None:
            self._first = here.step
        anchors = self._anchors.get(component, [])
        weights = self.forecaster.weights(anchors, here, {})
        due = (here.step - self._first) % self.every == 0 or len(anchors) < min(self.forecaster.depth, 2)
        if due or weights is None:
            self.computed.append(here.step)
            return None
        self.skipped.append(here.step)
        return mix(attachment.state.get(self.name, component, "uncond"), weights)

    def _keep(self, attachment: Attachment, component: str, here: StepContext, values: Values) -> None:
        depth = self.forecaster.depth
        old = attachment.state.get(self.name, component, "uncond") or ()
        attachment.state.set(self.name, component, "uncond", (values, *old[: depth - 1]))
        self._anchors[component] = [Anchor(here.step, here.sigma), *self._anchors.get(component, [])][:depth]


def guider_interval(sigmas: list[float] | tuple[float, ...], interval: tuple[float, float]) -> tuple[float, float]:
    """Return `start` and `stop` of diffusers' guiders, fractions of the steps, that mean an interval of noise levels.

    Guiders guide at steps with `int(start N) <= step < int(stop N)`, so what they mean changes with the shift.

    Args:
        sigmas: noise levels of the run, falling, (N,).
        interval: lowest and highest sigma with guidance.

    Returns:
        (start, stop).

    Raises:
        ValueError: no step lies in the interval.
    """
    inside = [step for step, sigma in enumerate(sigmas) if in_interval(sigma, interval)]
    if not inside:
        raise ValueError(f"no step of the run lies in the guidance interval {interval}: its levels are {sigmas}")
    count = len(sigmas)
    return (inside[0] + 1e-6) / count, min((inside[-1] + 1 + 1e-6) / count, 1.0)


def _or_zeros(difference: Values, like: Values) -> Values:
    return difference or tuple(torch.zeros_like(tensor) for tensor in like)


def _half_size(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> int:
    family = family_of(model)
    return len(family.latents(family.bind(model, args, kwargs))) // 2


def _is_list(tensors: Values, size: int) -> bool:
    """Return whether the tensors of an output are its samples, without a dimension for the batch."""
    return len(tensors) == size and any(len(tensor) != size for tensor in tensors)


def _halves(tensors: Values, size: int) -> tuple[Values, Values]:
    """Return both halves of an output of `size` samples."""
    if _is_list(tensors, size):
        return tensors[: size // 2], tensors[size // 2 :]
    first, second = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
    return first, second


def _with_list(output: Any, samples: list[Tensor]) -> Any:
    """Return an output with another list of samples."""
    if isinstance(output, list):
        return samples
    if isinstance(output, tuple):
        return (samples, *output[1:])
    return type(output)(sample=samples)


def _half(value: Any, size: int, first: bool) -> Any:
    """Take one half of everything that is as long as the doubled batch."""
    if isinstance(value, Tensor):
        return value.chunk(2)[0 if first else 1] if value.ndim and len(value) == size else value
    if isinstance(value, dict):
        return {key: _half(item, size, first) for key, item in value.items()}
    if isinstance(value, tuple | list):
        # a list of samples; tuples of as many tensors are something else, such as cosines and sines
        if isinstance(value, list) and len(value) == size and size and all(isinstance(item, Tensor) for item in value):
            return value[: size // 2] if first else value[size // 2 :]
        return type(value)(_half(item, size, first) for item in value)
    return value
