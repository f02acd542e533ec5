"""From logits to tokens: guidance that grows from scale to scale, truncation, and draws in a fixed order.

Pure functions on logits (B, N, V): B pictures, N tokens of a scale, V entries of the codebook. The order of operations
and of random draws is that of the released sampler of VAR (arXiv 2404.02905), so a seed gives the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One that serves the whole batch in one draw, one per picture, or None (torch's global state)."""


def ramp(scale: int, num_scales: int) -> float:
    """How far a run has come: 0 at the first scale, 1 at the last (1 also when there is but one)."""
    return scale / (num_scales - 1) if num_scales > 1 else 1.0


def guide_logits(cond: Tensor, uncond: Tensor, strength: float) -> Tensor:
    """Push logits away from the unconditional ones: `(1 + strength) cond - strength uncond`.

    Args:
        cond: (B, N, V).
        uncond: (B, N, V).
        strength: 0 is no guidance; this is diffusers' guidance scale less 1.

    Returns:
        (B, N, V).
    """
    return (1 + strength) * cond - strength * uncond


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the `k` likeliest entries; entries equal to the last of them stay.

    Args:
        logits: (B, N, V).
        k: how many; 0, or V and more, keeps all.

    Returns:
        (B, N, V), -inf where ruled out.
    """
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)  # (B, N, 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out the least likely entries whose probabilities sum up to at most `1 - p` (arXiv 1904.09751).

    Args:
        logits: (B, N, V).
        p: share of the probability that stays; 0 keeps all. The likeliest entry always stays.

    Returns:
        (B, N, V), -inf where ruled out.
    """
    if p <= 0:
        return logits
    ascending, order = logits.sort(dim=-1)  # (B, N, V)
    is_out = ascending.softmax(-1).cumsum(-1) <= 1 - p  # (B, N, V)
    is_out[..., -1] = False
    return logits.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)


def truncate(logits: Tensor, top_k: int = 0, top_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Temperature, then `keep_top_k`, then `keep_top_p` on what is left.

    Args:
        logits: (B, N, V).
        top_k: 0 keeps all.
        top_p: 0 keeps all.
        temperature: divides the logits; below 1 is bolder, above 1 more varied.

    Returns:
        (B, N, V).
    """
    logits = logits if temperature == 1.0 else logits / temperature
    return keep_top_p(keep_top_k(logits, top_k), top_p)


def draw_tokens(logits: Tensor, generator: Generators = None) -> Tensor:
    """Draw one entry a token.

    Args:
        logits: (B, N, V).
        generator: a single one draws all B N tokens at once, picture by picture; of a list, each draws the N tokens of
            its picture, which then don't depend on the batch.

    Returns:
        Indices, (B, N), int64.
    """
    probabilities = logits.softmax(-1)  # (B, N, V)
    if isinstance(generator, Sequence):
        rows = [_multinomial(one, each) for one, each in zip(probabilities, generator, strict=True)]  # B x (N,)
        return torch.stack(rows)  # (B, N)
    return _multinomial(probabilities.flatten(0, 1), generator).unflatten(0, logits.shape[:2])  # (B, N)


def _multinomial(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one entry of each row of (M, V); (M,)."""
    device = probabilities.device if generator is None else generator.device
    drawn = torch.multinomial(probabilities.to(device), 1, replacement=True, generator=generator)  # (M, 1)
    return drawn[:, 0].to(probabilities.device)  # (M,)


def mix_codes(logits: Tensor, codebook: Tensor, progress: float, generator: Generators = None) -> Tensor:
    """Mix codebook entries by Gumbel-softmax weights (arXiv 1611.01144) in place of choosing one: smoother pictures.

    The weights sharpen as the picture grows, as in MaskGIT (arXiv 2202.04200). It comes after `draw_tokens` in the
    order of random draws. Good to look at, not for benchmarks.

    Args:
        logits: truncated, (B, N, V).
        codebook: (V, C).
        progress: see `ramp`.
        generator: as for `draw_tokens`.

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
