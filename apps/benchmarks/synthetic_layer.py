"""Inputs as a modulated norm of a diffusion transformer makes them: a few channels are outliers, less so later on.

Six channels are 25 times as large as the others at the first noise level and 8 times at the second. All channels have a
scale of their own, most of which both levels share: the table of adaLN changes it a little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit.quant.layer import QuantizedWeights, fake_quantized_output
from dit.quant.statistics import LayerStatistics, RunningStatistics
from dit.runtime.metrics import relative_error

OUTLIERS = 6
SIZES = 25.0, 8.0
"""Of the outliers, by noise level."""
SIGMAS = 0.9, 0.1
SHARED_SPREAD, OWN_SPREAD = 0.3, 0.2
"""Standard deviations of the logarithm of channels' scales, common to the noise levels and not."""


@dataclass(frozen=True, eq=False)
class SyntheticLayer:
    """A linear layer and the scales of its inputs' channels.

    Attributes:
        linear: N outputs, K inputs, Gaussian weights.
        channels: scale of the channels by noise level, (2, K).
    """

    linear: nn.Linear
    channels: Tensor

    @classmethod
    def make(cls, columns: int = 1152, rows: int | None = None, seed: int = 0, bias: bool = False) -> SyntheticLayer:
        """Draw a layer; `rows` are as many as `columns` unless said otherwise."""
        generator = torch.Generator().manual_seed(seed)
        linear = nn.Linear(columns, rows or columns, bias=bias)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        shared = torch.randn(columns, generator=generator) * SHARED_SPREAD
        own = torch.randn(2, columns, generator=generator) * OWN_SPREAD
        channels = (shared + own).exp()  # (2, K)
        channels[:, torch.randperm(columns, generator=generator)[:OUTLIERS]] *= torch.tensor(SIZES)[:, None]
        return cls(linear, channels)

    def inputs(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw inputs of both noise levels, (M, K) each."""
        generator = torch.Generator().manual_seed(1000 + seed)
        drawn = torch.randn(2, tokens, self.channels.shape[1], generator=generator) * self.channels[:, None]
        return drawn[0], drawn[1]

    def statistics(self, tokens: int = 2048, rows: int = 256, gram: bool = False) -> LayerStatistics:
        """Gather statistics of inputs of both levels."""
        running = RunningStatistics("synthetic", self.channels.shape[1], rows, gram)
        for level, x in enumerate(self.inputs(tokens, seed=1)):
            for call in x.chunk(4):
                running.add(level, "all", call)
        return running.result(tuple(enumerate(SIGMAS)))

    def errors(self, quantized: QuantizedWeights, tokens: int = 512) -> tuple[float, float]:
        """Return the relative error of the output at both levels, of inputs that no statistics saw."""
        first, second = (
            relative_error(fake_quantized_output(x, quantized), self.linear(x).detach())
            for x in self.inputs(tokens, seed=2)
        )
        return first, second
