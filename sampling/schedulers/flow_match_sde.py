"""Sampling a flow model by its reverse SDE, as SiT does (arXiv 2401.08740, section 2.4 and appendix B).

A flow that predicts the velocity along `x = (1 - sigma) data + sigma noise` also knows the score, so noise may be
added back at any rate w(sigma) as long as the drift removes it again: `dx = (v + w score) dt + sqrt(2 w) dW`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit.runtime._typing import Typed

DIFFUSION_FORMS = ("constant", "sigma", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "tweedie", "euler")


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """What a step gives.

    Attributes:
        prev_sample: (B, C, H, W), the sample at the next, lower noise level.
        pred_original_sample: (B, C, H, W), the data that the velocity points to.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


def diffusion_rate(sigma: Tensor, form: str, norm: float = 1.0) -> Tensor:
    """Return the rate w(sigma) at which noise is added back.

    Args:
        sigma: noise level in [0, 1], any shape.
        form: "constant" norm; "sigma" norm sigma; "decreasing" ((norm cos(pi (1 - sigma)) + 1) / 2)^2;
            "increasing-decreasing" norm sin(pi (1 - sigma))^2.
        norm: factor of the forms; 0 gives the ODE for all but "decreasing".

    Returns:
        w, same shape.

    Raises:
        ValueError: the form is unknown.
    """
    time = 1 - sigma
    if form == "constant":
        return torch.full_like(sigma, norm)
    if form == "sigma":
        return norm * sigma
    if form == "decreasing":
        return 0.25 * (norm * torch.cos(math.pi * time) + 1) ** 2
    if form == "increasing-decreasing":
        return norm * torch.sin(math.pi * time) ** 2
    raise ValueError(f"diffusion_form {form!r} is not known; use one of {', '.join(DIFFUSION_FORMS)}")


class FlowMatchSDEScheduler(Typed, SchedulerMixin, ConfigMixin):
    """Euler-Maruyama over a linear flow, closed by one long step without noise; the default sampler of SiT.

    The model output is the velocity `noise - data`, the convention of diffusers' flow schedulers.

    Args:
        num_train_timesteps: `timesteps` are `sigma * num_train_timesteps`, as in diffusers' flow schedulers.
        diffusion_form: see `diffusion_rate`.
        diffusion_norm: see `diffusion_rate`.
        last_step: what the closing step does: "mean" follows the SDE's drift, "euler" the flow, "tweedie" jumps to
            the mean of the data given the sample.
        last_step_size: length of the closing step, in (0, 1).

    Raises:
        ValueError: an unknown form or closing step, or a length out of range.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        last_step_size: float = 0.04,
    ) -> None:
        diffusion_rate(torch.ones(()), diffusion_form)  # raises for an unknown form
        if last_step not in LAST_STEPS:
            raise ValueError(f"last_step {last_step!r} is not known; use one of {', '.join(LAST_STEPS)}")
        if not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size is {last_step_size}; use a length between 0 and 1, such as 0.04")
        self.num_inference_steps: int | None = None
        self.timesteps = torch.zeros(0)
        self.sigmas = torch.zeros(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Which step comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Which step a run starts with; None finds it by the first timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which step the run starts with."""
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set equal steps from pure noise to `last_step_size`, where the closing step begins.

        Args:
            num_inference_steps: calls of the model, the closing step included; at least 2.
            device: where `timesteps` go.

        Raises:
            ValueError: fewer than 2 steps.
        """
        if num_inference_steps < 2:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; the SDE needs at least 2")
        times = torch.linspace(0, 1 - self.config.last_step_size, num_inference_steps, dtype=torch.float64)
        sigmas = 1 - times  # (steps,), from 1 down to last_step_size
        self.num_inference_steps = num_inference_steps
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(device=device, dtype=torch.float32)
        self.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=sigmas.dtype)]).float()  # on the CPU: read per step
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Return the sample as it is; flows need no scaling."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Mix data (B, C, H, W) with noise to the level of `timestep` (B,)."""
        sigma = (timestep.to(sample) / self.config.num_train_timesteps).reshape(-1, *[1] * (sample.ndim - 1))
        return (1 - sigma) * sample + sigma * noise  # (B, C, H, W)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSDESchedulerOutput | tuple[Tensor, Tensor]:
        """Step towards the data.

        Args:
            model_output: (B, C, H, W), the velocity `noise - data`.
            timestep: the entry of `timesteps` that the model was called with.
            sample: (B, C, H, W).
            generator: one, or one an image, for the noise that is added back.
            return_dict: return an object rather than a tuple.

        Returns:
            The next sample and the estimate of the data, in the dtype of `model_output`.

        Raises:
            ValueError: `set_timesteps` was not called.
        """
        if self.num_inference_steps is None:
            raise ValueError("the scheduler has no steps yet; call set_timesteps(num_inference_steps) first")
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self._index_of(timestep) if begin is None else begin
        sigma, is_last = self.sigmas[self._step_index], self._step_index == self.num_inference_steps - 1
        x, velocity = sample.float(), -model_output.float()  # towards the data, (B, C, H, W)
        score = ((1 - sigma) * velocity - x) / sigma  # (B, C, H, W)
        rate = diffusion_rate(sigma, self.config.diffusion_form, self.config.diffusion_norm)  # ()
        drift = velocity + rate * score  # (B, C, H, W)
        if is_last:
            x = self._closing_step(x, velocity, drift, score, sigma)
        else:
            length = sigma - self.sigmas[self._step_index + 1]
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + drift * length + torch.sqrt(2 * rate * length) * noise
        self._step_index += 1
        data = sample.float() + sigma * velocity  # (B, C, H, W)
        output = (x.to(model_output.dtype), data.to(model_output.dtype))
        return FlowMatchSDESchedulerOutput(*output) if return_dict else output

    def _closing_step(self, x: Tensor, velocity: Tensor, drift: Tensor, score: Tensor, sigma: Tensor) -> Tensor:
        """Step from `sigma` to no noise at all; all tensors (B, C, H, W)."""
        if self.config.last_step == "tweedie":
            return (x + sigma**2 * score) / (1 - sigma)
        return x + (drift if self.config.last_step == "mean" else velocity) * self.config.last_step_size

    def _index_of(self, timestep: float | Tensor) -> int:
        """Return where `timesteps` holds this value."""
        found = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if not len(found):
            raise ValueError(f"timestep {float(timestep):g} is not one of scheduler.timesteps; pass one of them")
        return int(found[0])

    def __len__(self) -> int:
        return self.config.num_train_timesteps
