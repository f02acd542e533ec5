"""PrecisionByStep: quantized layers that keep 16-bit activations at the steps of a policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import nn

from dit.quant.linear import QuantLinear
from dit.quant.step_policy import StepPolicy
from dit.runtime.hooks import AttachError, Attachment, Mechanism
from dit.runtime.stages import Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, current_step


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
