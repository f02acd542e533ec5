"""What networks of diffusion and flow matching are trained on: noisy data and what is to be predicted of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sampling.objectives import logit_normal_sigmas, shift_sigmas

CELLS = 1024  # of the histogram that noise levels within bounds are drawn from
Prediction = Literal["velocity", "reversed_velocity", "epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoiseProcess:
    """How a scheduler's data becomes noise, and what its networks predict of it.

    Attributes:
        prediction: "velocity" is noise - data of rectified flow, "reversed_velocity" data - noise where time runs
            the other way; "epsilon", "v_prediction" and "sample" are those of DDPM (arXiv 2006.11239, 2202.00512).
        num_timesteps: of the scheduler.
        shift: of flows: moves noise levels towards noise, see `shift_sigmas`.
        alphas: of DDPM: share of the data's variance at each timestep, (num_timesteps,); None for flows.
        bounds: lowest and highest timestep that a network is asked at, where a pipeline has several that share them;
            None is all.
    """

    prediction: Prediction
    num_timesteps: int
    shift: float = 1.0
    alphas: Tensor | None = None
    bounds: tuple[float, float] | None = None

    @property
    def is_flow(self) -> bool:
        """Whether data become noise on straight paths."""
        return self.alphas is None

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Return the noise levels of timesteps of a flow, (B,): 0 is data, 1 is noise."""
        level = timesteps.double() / self.num_timesteps
        return 1 - level if self.prediction == "reversed_velocity" else level

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """Return the timesteps of noise levels of a flow, (B,) float64."""
        level = 1 - sigmas.double() if self.prediction == "reversed_velocity" else sigmas.double()
        return level * self.num_timesteps

    def add_noise(self, data: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy data.

        Args:
            data: (B, ...).
            noise: (B, ...), normal.
            timesteps: (B,); whole numbers for DDPM.
        """
        keep, add = self._scales(timesteps, data)
        return keep * data + add * noise

    def target(self, data: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what a network should predict, (B, ...); arguments as of `add_noise`."""
        if self.prediction == "velocity":
            return noise - data
        if self.prediction == "reversed_velocity":
            return data - noise
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return data
        keep, add = self._scales(timesteps, data)
        return keep * noise - add * data  # arXiv 2202.00512, appendix D

    def draw_timesteps(
        self, count: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw timesteps to train on: of flows with logit-normal noise levels, of DDPM evenly spread.

        Args:
            count: B.
            mean: of the logit, see `logit_normal_sigmas`.
            std: of the logit; 0 draws flows' levels evenly too.
            generator: source of the random numbers; on the CPU.

        Returns:
            (B,) float64.
        """
        if not self.is_flow:
            lowest, highest = self.bounds or (0, self.num_timesteps)
            return torch.randint(math.ceil(lowest), math.ceil(highest), (count,), generator=generator).double()
        if self.bounds is not None:
            return self.timesteps(shift_sigmas(self._bounded_sigmas(count, mean, std, generator), self.shift))
        if std == 0:
            return self.timesteps(shift_sigmas(torch.rand(count, generator=generator).clamp(1e-5), self.shift))
        return self.timesteps(logit_normal_sigmas(count, mean, std, self.shift, generator))

    def grid(self, count: int) -> Tensor:
        """Return evenly spread timesteps, (count,) float64: those of a validation."""
        levels = (torch.arange(count) + 0.5) / count  # (count,)
        if not self.is_flow:
            lowest, highest = self.bounds or (0, self.num_timesteps)
            return (lowest + levels * (highest - lowest)).long().double()
        low, high = self._plain_bounds()
        return self.timesteps(shift_sigmas(low + levels * (high - low), self.shift))

    def _plain_bounds(self) -> tuple[float, float]:
        """Return the bounds of a flow as noise levels before the shift."""
        if self.bounds is None:
            return 0.0, 1.0
        sigmas = self.sigmas(torch.tensor(self.bounds, dtype=torch.float64))  # (2,)
        low, high = (sigmas / (self.shift - (self.shift - 1) * sigmas)).sort().values.tolist()  # undoes `shift_sigmas`
        return low, high

    def _bounded_sigmas(self, count: int, mean: float, std: float, generator: torch.Generator | None) -> Tensor:
        """Draw noise levels of a flow before the shift: logit-normal ones, of which only those within bounds count.

        From a histogram, because bounds may lie where hardly any of all levels do.

        Returns:
            (count,) float64.
        """
        low, high = self._plain_bounds()
        middles = low + (high - low) * (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS  # (CELLS,)
        densities = torch.zeros(CELLS, dtype=torch.float64)
        if std > 0:
            densities = -(((middles.logit() - mean) / std) ** 2) / 2 - (middles * (1 - middles)).log()  # logarithms
        cells = torch.multinomial(densities.softmax(0), count, replacement=True, generator=generator)  # (count,)
        places = cells + torch.rand(count, generator=generator, dtype=torch.float64)  # (count,)
        return low + (high - low) * places / CELLS

    def _scales(self, timesteps: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of data and noise, each (B, 1, ...)."""
        shape = (-1, *[1] * (data.ndim - 1))
        if self.alphas is None:
            sigmas = self.sigmas(timesteps)
            keep, add = 1 - sigmas, sigmas
        else:
            alphas = self.alphas.to(timesteps.device).double()[timesteps.long()]
            keep, add = alphas.sqrt(), (1 - alphas).sqrt()
        return keep.reshape(shape).to(data.device, data.dtype), add.reshape(shape).to(data.device, data.dtype)


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler's noise levels are those of a flow: x = (1 - sigma) * data + sigma * noise."""
    config = scheduler.config
    return (
        type(scheduler).__name__.startswith("FlowMatch")
        or str(config.get("prediction_type")).startswith("flow")
        or bool(config.get("use_flow_sigmas"))
    )


def noise_process(scheduler: Any) -> NoiseProcess:
    """Return the noise process of a scheduler of diffusers.

    Args:
        scheduler: of flow matching, or of the DDPM kind.

    Raises:
        ValueError: it is neither, or its prediction is unknown.
    """
    config = scheduler.config
    kind, count = config.get("prediction_type", "epsilon"), int(config.get("num_train_timesteps", 1000))
    shift = config.get("shift") or config.get("flow_shift") or 1.0
    if is_flow(scheduler):
        # Schedulers whose shift depends on the size of the image shift nothing before they know it.
        shift = 1.0 if config.get("use_dynamic_shifting") else float(shift)
        return NoiseProcess("reversed_velocity" if config.get("invert_sigmas") else "velocity", count, shift)
    if kind == "trigflow":
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type={kind!r} is that of a consistency model, distilled to "
            "few steps, which noisy data alone can't train: fine-tune the model that it was distilled from"
        )
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type={kind!r} can't be trained on: expected flow matching, or "
            "DDPM, DDIM or DPM-Solver that predict epsilon, v_prediction or sample; replace the pipeline's scheduler"
        )
    return NoiseProcess(kind, count, alphas=alphas.clone())


def mean_squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error of each sample, (B,) float32, of predictions and targets (B, ...)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)  # (B,)
