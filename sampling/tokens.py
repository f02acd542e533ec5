"""Logits to tokens: guidance that grows from scale to scale, filtering, and sampling in a fixed order.

Pure functions on logits (B, ..., V): B images, and V choices for each of what is drawn: the N tokens of a scale with
V entries of a codebook, (B, N, V), or the d bits of each token, (B, N, d, 2). The order of operations and of random
draws is that of the released samplers of VAR (arXiv 2404.02905) and Infinity (arXiv 2412.04431), so a seed gives the
same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for the whole batch, one per image, or None (torch's global state)."""


def ramp(scale: int, num_scales: int) -> float:
    """Return how far a run has come: 0 at the first scale, 1 at the last (1 also when there is but one)."""
    return scale / (num_scales - 1) if num_scales > 1 else 1.0


def guide_logits(cond: Tensor, uncond: Tensor, strength: float) -> Tensor:
    """Push logits away from the unconditional ones: `(1 + strength) cond - strength uncond`.

    Args:
        cond: (B, ..., V).
        uncond: (B, ..., V).
        strength: 0 is no guidance; this is diffusers' guidance scale less 1.

    Returns:
        (B, ..., V).
    """
    return (1 + strength) * cond - strength * uncond


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the `k` likeliest entries; entries equal to the last of them stay.

    Args:
        logits: (B, ..., V).
        k: how many; 0, or V and more, keeps all.

    Returns:
        (B, ..., V), -inf where ruled out.
    """
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)  # (B, ..., 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def top_p_filter(logits: Tensor, p: float) -> Tensor:
    """Rule out the least likely entries whose probabilities sum up to at most `1 - p` (arXiv 1904.09751).

    Args:
        logits: (B, ..., V).
        p: fraction of the probability that stays; 0 keeps all. The likeliest entry always stays.

    Returns:
        (B, ..., V), -inf where ruled out.
    """
    if p <= 0:
        return logits
    ascending, order = logits.sort(dim=-1)  # (B, ..., V)
    is_out = ascending.softmax(-1).cumsum(-1) <= 1 - p  # (B, ..., V)
    is_out[..., -1] = False
    return logits.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)


def top_k_top_p_filter(logits: Tensor, top_k: int = 0, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Apply the temperature, then `top_k_filter`, then `top_p_filter` on what is left.

    Args:
        logits: (B, ..., V).
        top_k: 0 keeps all.
        top_p: 0 keeps all.
        temperature: divides the logits; below 1 is bolder, above 1 more varied.

    Returns:
        (B, ..., V).
    """
    logits = logits if temperature == 1.0 else logits / temperature
    return top_p_filter(top_k_filter(logits, top_k), top_p)


def sample_tokens(logits: Tensor, generator: Generators = None) -> Tensor:
    """Draw one of the choices for each token (or bit).

    Args:
        logits: (B, ..., V).
        generator: a single one draws for the whole batch at once, image by image; of a list, each draws the tokens
            of its image, which then don't depend on the batch.

    Returns:
        Choices, (B, ...), int64.
    """
    probabilities = logits.softmax(-1)  # (B, ..., V)
    if isinstance(generator, Sequence):
        rows = [_multinomial(one, each) for one, each in zip(probabilities, generator, strict=True)]  # B x (...)
        return torch.stack(rows)  # (B, ...)
    return _multinomial(probabilities, generator)  # (B, ...)


def _multinomial(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one of the last axis of (..., V); (...)."""
    device = probabilities.device if generator is None else generator.device
    rows = probabilities.flatten(0, -2).to(device)  # (M, V)
    drawn = torch.multinomial(rows, 1, replacement=True, generator=generator)  # (M, 1)
    return drawn.view(probabilities.shape[:-1]).to(probabilities.device)  # (...)


def mix_codes(logits: Tensor, codebook: Tensor, progress: float, generator: Generators = None) -> Tensor:
    """Mix codebook entries by Gumbel-softmax weights (arXiv 1611.01144) instead of choosing one: smoother images.

    The weights sharpen as the image grows, as in MaskGIT (arXiv 2202.04200). It comes after `sample_tokens` in the
    order of random draws. Good to look at, not for benchmarks.

    Args:
        logits: truncated, (B, N, V).
        codebook: (V, C).
        progress: see `ramp`.
        generator: as for `sample_tokens`.

    Returns:
        Mixed entries, (B, N, C).
    """
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    noise = -_exponential(logits, generator).log()  # (B, N, V), Gumbel
    weights = ((logits * (1 + progress) + noise) / tau).softmax(-1)  # (B, N, V)
    return weights @ codebook.to(weights.dtype)  # (B, N, C)


def _exponential(like: Tensor, generator: Generators) -> Tensor:
    """Draw from Exponential(1), (B, N, V), in the dtype and on the device of `like`."""
    if isinstance(generator, Sequence):
        return torch.cat([_exponential(row[None], each) for row, each in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    noise = torch.empty(like.shape, dtype=like.dtype, device=device).exponential_(generator=generator)
    return noise.to(like.device)
