"""SGD-SaI: SGD with momentum whose learning rate is scaled once for every tensor, by its gradient's signal-to-noise."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT


class SGDSaI(torch.optim.Optimizer):
    """SGD with learning-rate Scaling at Initialization (arXiv:2412.11768), one state tensor per parameter.

    For every parameter tensor p of n elements with gradient g:

        gsnr <- ||g|| / (std(g) + eps)                                  once
        m    <- g at first, then momentum * m + (1 - momentum) * g
        p    <- (1 - lr * weight_decay) * p - lr * gsnr * m

    gsnr is about sqrt(n) where the elements of g have mean zero, so that the root mean square of an update is about
    lr * ||m||: at most lr where gradients are clipped to norm 1.

    The published code measures gsnr at the first step whatever the gradient is. A tensor whose gradient is zero then
    (all before a zero-initialised output; A of a LoRA, as its B is zero) gets gsnr = 0 and never trains; a gradient
    without spread (a tensor of one element) gets ||g|| / eps and diverges. Here a tensor begins at its first non-zero
    gradient, until when it has no state and only decays, and no spread counts as mean zero: gsnr = sqrt(n), 1 for one
    element.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate, at least 0; the published default is 1e-2.
        momentum: Share of m that stays, in [0, 1).
        weight_decay: Decoupled weight decay, at least 0.
        eps: Added to the standard deviation, at least 0.
        compat: Measure like the published code, with the two defects above.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 1e-2,
        eps: float = 1e-8,
        compat: bool = False,
    ) -> None:
        for name, value in {"lr": lr, "weight_decay": weight_decay, "eps": eps}.items():
            if not value >= 0:
                raise ValueError(f"{name} = {value} of SGD-SaI must be at least 0; its default suits most networks")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum = {momentum} of SGD-SaI must be in [0, 1); 0.9 is the published value")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})
        self.compat = compat

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the loss anew, with gradients.

        Returns:
            The loss of the closure, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, float]) -> None:
        state = self.state[parameter]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if "gsnr" in state:
            state["momentum_buffer"].mul_(group["momentum"]).add_(gradient, alpha=1 - group["momentum"])
        elif self.compat or gradient.any():
            measure = published_gsnr if self.compat else gradient_snr
            state["gsnr"] = measure(gradient, group["eps"])
            state["momentum_buffer"] = gradient.clone()
        else:
            return
        # gsnr stays on the device: as the `alpha` of an addition it would have to come to the CPU at every step.
        parameter.addcmul_(state["momentum_buffer"], state["gsnr"], value=-group["lr"])


def gradient_snr(gradient: Tensor, eps: float) -> Tensor:
    """Return the signal-to-noise ratio of a gradient (g-SNR of arXiv:2412.11768).

    Args:
        gradient: Not all zero, any shape of n elements.
        eps: Added to the standard deviation.

    Returns:
        ||g|| / (std(g) + eps), or sqrt(n) where the spread is no more than rounding: (), fp32.
    """
    gradient = gradient.float()
    norm = torch.linalg.vector_norm(gradient)
    usual = torch.full_like(norm, math.sqrt(gradient.numel()))  # of a gradient of mean zero
    if gradient.numel() == 1:
        return usual
    spread = gradient.std()
    return torch.where(spread > torch.finfo(torch.float32).eps * norm, norm / (spread + eps), usual)


def published_gsnr(gradient: Tensor, eps: float) -> Tensor:
    """Return ||g|| / (std(g) + eps) as the published code does: 0 for no gradient, ||g|| / eps for one without spread.

    Args:
        gradient: Any shape.
        eps: Added to the standard deviation, which is 0 for a single element.

    Returns:
        The ratio: (), fp32.
    """
    gradient = gradient.float()
    spread = gradient.std() if gradient.numel() > 1 else gradient.new_zeros(())
    return torch.linalg.vector_norm(gradient) / (spread + eps)
