"""Precision by step: quantized layers whose activations keep 16 bits at the first and last steps of a run.

The weights are the same bytes at all steps. Early steps decide what is seen, and late ones leave errors no time to be
repaired; in between quantized activations cost least. Both branches of guidance of a step are computed alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import nn

from dit.quant.step_policy import StepPolicy
from dit.runtime.hooks import Attachment, Mechanism
from dit.runtime.stages import Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, current_step
from pipelines.quantization.networks import quantized_layers_of
from sampling.step_tracker import TrackedAttachment


def stored_policy(network: nn.Module) -> StepPolicy | None:
    """Return the policy in the configuration of a quantized network; None if there is none.

    Args:
        network: wrapped or not.

    Raises:
        ValueError: it can't be read.
    """
    config = getattr(getattr(unwrap(network), "config", None), "quantization_config", None)
    runtime = config.get("runtime") if isinstance(config, Mapping) else getattr(config, "runtime", None)
    policy = runtime.get("diffusion_step_policy") if isinstance(runtime, Mapping) else None
    if policy is None:
        return None
    if not isinstance(policy, Mapping):
        raise ValueError(f"diffusion_step_policy is {policy!r:.80}, expected an object of its fields")
    return StepPolicy.from_dict(policy)


class StepCounter:
    """Sets the precision of quantized layers for each call of their network, and counts steps.

    Args:
        policy: at which steps activations keep 16 bits.

    Attributes:
        steps: that were called, of all runs.
        full: those with 16-bit activations.
    """

    def __init__(self, policy: StepPolicy) -> None:
        self.policy, self.steps, self.full = policy, 0, 0
        self._last: tuple[int, int] | None = None

    def install(self, attachment: Attachment) -> None:
        """Watch the networks of an attachment that denoise; for a mechanism's `install`."""
        enter: Any = torch.compiler.disable(self._enter)
        for component, model in attachment.models.items():
            if not component.startswith("transformer"):
                continue
            bare: Any = unwrap(model)
            attachment.on_detach(partial(self._set, bare, False))
            if callable(getattr(type(bare), "step", None)):  # next-scale models are called so, scale by scale
                attachment.replace(bare, "step", _preceded(bare.step, partial(enter, attachment, bare)))
            else:
                attachment.pre_hook(model, partial(_entering, enter, attachment))

    def _enter(self, attachment: Attachment, network: nn.Module) -> None:
        here = current_step()
        if here is None:
            attachment.skip("no step context")
        self._set(network, here is not None and self._is_full(here))

    def _is_full(self, here: StepContext) -> bool:
        is_full = self.policy.is_full(here.step, here.num_steps, here.sigma)
        if (here.run, here.step) != self._last:
            self._last = here.run, here.step
            self.steps += 1
            self.full += is_full
        return is_full

    @staticmethod
    def _set(network: nn.Module, is_full: bool) -> None:
        for layer in quantized_layers_of(network):
            layer.full_precision = is_full


def _entering(enter: Callable[..., Any], attachment: Attachment, model: nn.Module, *_: Any) -> None:
    enter(attachment, unwrap(model))


def _preceded(function: Callable[..., Any], before: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that calls another one first."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        before()
        return function(*args, **kwargs)

    return called


class StepPrecision(Mechanism):
    """Have a quantized pipeline keep 16-bit activations at some steps.

    Args:
        policy: at which.
    """

    name: ClassVar[str] = "step_precision"
    stage: ClassVar[Stage] = Stage.QUANTIZATION

    def __init__(self, policy: StepPolicy) -> None:
        self.counter = StepCounter(policy)

    def install(self, attachment: Attachment) -> None:
        """Watch the calls of the networks."""
        self.counter.install(attachment)

    def attach(self, target: Any) -> Attachment:
        """Attach to a pipeline; its steps are found too."""
        return TrackedAttachment(self, target)

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return how many steps there were, and at how many activations kept 16 bits."""
        return {"steps": self.counter.steps, "full_precision_steps": self.counter.full}
