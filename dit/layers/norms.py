"""Normalisation layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale.

    Same weights as `torch.nn.RMSNorm`; the scale is cast to the input's dtype, so that the fused kernel (which sums
    in float32) also serves under autocast, where activations are bfloat16 and weights float32.

    Args:
        dim: width of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., dim)."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
