"""Exponential moving average of the weights: what is validated, previewed and exported."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class MovingAverage:
    """A slow copy of parameters.

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
