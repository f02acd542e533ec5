"""Losses of quantizers, besides the reconstruction error. Pure functions; everything is float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-7  # keeps logarithms and their gradients finite


def straight_through(features: Tensor, quantised: Tensor) -> Tensor:
    """Return the quantized values with the gradient passed straight to the features (arXiv 1308.3432)."""
    return features + (quantised - features).detach()


def residual_loss(features: Tensor, sums: Sequence[Tensor], commitment: float) -> Tensor:
    """Pull what the scales add up to towards the features, and, more weakly, the features towards it.

    The mean over the scales of `|sg(f) - sum|^2 + commitment |f - sg(sum)|^2`: VQ-VAE's two terms (arXiv 1711.00937,
    eq. 3) at every scale, as VAR trains (arXiv 2404.02905). The coarse scales so learn to say as much as they can.

    Args:
        features: (B, C, H, W).
        sums: of the first scale, the first two, ... all scales, (B, C, H, W) each.
        commitment: weight of the second term.
    """
    parts = [F.mse_loss(part, features.detach()) + commitment * F.mse_loss(features, part.detach()) for part in sums]
    return torch.stack(parts).mean()


def code_entropy(features: Tensor, codebook: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of each choice less that of their mean: `mean H(p) - H(mean p)` in nats (arXiv 2310.05737).

    Lower is better: certain choices that use the whole codebook.

    Args:
        features: what is to be quantised, (M, C).
        codebook: (V, C).
        temperature: of the soft choice `p = softmax(-distance^2 / temperature)`.
    """
    distances = torch.cdist(features, codebook).square()  # (M, V)
    log_p = (-distances / temperature).log_softmax(-1)  # (M, V)
    mean = log_p.exp().mean(0).clamp(min=TINY)  # (V,)
    certain = -(log_p.exp() * log_p).sum(-1).mean()
    return certain + (mean * mean.log()).sum()


def bit_entropy(features: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute `code_entropy` of binary spherical codes per bit (arXiv 2406.07548, section 3.3), averaged over bits.

    Args:
        features: (M, d); a bit is the sign of a channel.
        temperature: of the soft choice between the two values `+-1/sqrt(d)`, in units of their square.
    """
    scores = 4 * features * features.shape[-1] ** 0.5 / temperature  # (M, d)
    p = torch.sigmoid(scores)  # (M, d)
    each = -(p * F.logsigmoid(scores) + (1 - p) * F.logsigmoid(-scores)).mean(0)  # (d,)
    mean = p.mean(0).clamp(TINY, 1 - TINY)  # (d,)
    return (each + mean * mean.log() + (1 - mean) * (1 - mean).log()).mean()
