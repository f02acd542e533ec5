"""Averages of the weights: what is validated, previewed and exported."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apps.training.config import OptimizerConfig


def weight_average(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, settings: OptimizerConfig
) -> "MovingAverage | OptimizerAverage":
    """Return the average of a run: the optimizer's own if it keeps one, otherwise a moving average.

    Args:
        parameters: The trained parameters by name.
        optimizer: The optimizer over them.
        settings: What it was made with.
    """
    if settings.name == "schedule_free":
        return OptimizerAverage(parameters, optimizer)
    return MovingAverage(parameters, settings.ema_decay)


class MovingAverage:
    """A slow copy of parameters: their exponential moving average.

    Args:
        parameters: The trained parameters by name; they are read at each update, never replaced.
        decay: Final decay. Early steps use `(1 + step) / (10 + step)`, or the random start would linger.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.shadow = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the copy towards the parameters after optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Swap the averaged weights in for the block; afterwards the trained ones are back, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            trained = parameter.clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(trained)


class OptimizerAverage:
    """The average that a schedule-free optimizer keeps (x of arXiv:2405.15682), made when it is asked for.

    Training is at y, between x and the optimizer's fast weights z; `optimizer.eval()` moves the parameters from y to
    x. Its `train()` moves them back up to rounding only, so a validation would change the run, and a preview or an
    export, which only the first process makes, would let the processes drift apart: the trained weights are kept and
    put back instead. For the same reason checkpoints hold y and not x.

    Args:
        parameters: The trained parameters by name.
        optimizer: Has `eval()` and `train()`; it must be in training mode.

    Attributes:
        shadow: Empty: x follows from the parameters and the state of the optimizer.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.parameters = parameters
        self.optimizer: Any = optimizer
        self.shadow: dict[str, Tensor] = {}

    def update(self, step: int) -> None:
        """Do nothing: the step of the optimizer has updated its average."""

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the parameters for the block; afterwards the trained ones are back, bit for bit."""
        trained = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(trained[name])
