"""Training with rounded weights: which layers round, and the annealing at the end of a run."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from apps.training.config import ConfigError, QuantizationSection
from dit.quant.training import annealing, prepare_training, trained_layers


class RoundedLayers:
    """The layers of a run that round.

    Args:
        modules: The networks of the task by name.
        section: What is asked for; None rounds nothing.
        steps: Optimizer steps of the run.

    Raises:
        ConfigError: A network is not there, or has nothing to round.
    """

    def __init__(self, modules: dict[str, nn.Module], section: QuantizationSection | None, steps: int) -> None:
        self.layers, self.anneals_from = [], steps
        if section is None:
            return
        self.anneals_from = steps - round(section.anneal_fraction * steps)
        missing = sorted(set(section.networks) - set(modules))
        if missing:
            raise ConfigError(
                f"quantization.networks has {missing[0]!r}; this task trains {', '.join(sorted(modules))}"
            )
        for name in section.networks:
            try:
                prepare_training(modules[name], section.settings())
            except ValueError as error:
                raise ConfigError(f"quantization of {name}: {error}") from error
        self.layers = trained_layers(modules[name] for name in section.networks)

    def around_step(self, step: int) -> AbstractContextManager[Any]:
        """Return what the gradient is clipped in and the optimizer steps in.

        Args:
            step: Number of the step, from 0.
        """
        return annealing(self.layers) if self.layers and step >= self.anneals_from else nullcontext()
