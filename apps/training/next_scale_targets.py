"""What next-scale networks are trained on: true tokens, the image before each scale, and how the scales are weighed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit.layers.scales import Grid, token_counts


@torch.no_grad()
def teacher_batch(
    vae: Any,
    tokens: Tensor,
    seen: Tensor,
    device: torch.device,
    scales: int | None = None,
    grids: Sequence[Grid] | None = None,
) -> dict[str, Tensor]:
    """Return targets and inputs of the first scales (teacher forcing, arXiv 2404.02905).

    Args:
        vae: Multi-scale tokenizer.
        tokens: True ones of all scales, (B, L) or (B, L, d).
        seen: What the network sees of them, of the same shape.
        device: Where the tokenizer is.
        scales: How many scales to train on; None is all.
        grids: The schedule of tokenizers that serve many; None is the tokenizer's own.

    Returns:
        `tokens` of these scales, and `inputs` (B, L' - N0, C); on the CPU.
    """
    counts = token_counts(vae.grids if grids is None else grids)
    scales = min(scales or len(counts), len(counts))
    known = seen.to(device).split(counts, dim=1)[: scales - 1]
    length = sum(counts[:scales])
    if not known:  # the first scale alone sees nothing
        size = vae.next_input(vae.start_latents(len(tokens)), 0).shape[-1]
        return {"tokens": tokens[:, :length], "inputs": torch.zeros(len(tokens), 0, size)}
    return {"tokens": tokens[:, :length], "inputs": vae.teacher_inputs(known, grids).cpu()}


def disturb(vae: Any, tokens: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Replace some tokens by random ones (bits by their opposites), so that a network learns to go on after a mistake.

    Args:
        vae: Multi-scale tokenizer.
        tokens: (B, L) or (B, L, d).
        most: Share of the tokens that are replaced; drawn anew for each image, between 0 and this.
        generator: Source of the random numbers.

    Returns:
        Tokens of the same shape.
    """
    if most == 0:
        return tokens
    share = most * torch.rand(len(tokens), generator=generator)  # (B,)
    share = share.reshape(-1, *[1] * (tokens.ndim - 1))
    wrong = torch.rand(tokens.shape, generator=generator) < share
    codes = 2 if tokens.ndim == 3 else vae.config.vocab_size
    return torch.where(wrong, torch.randint(codes, tokens.shape, generator=generator), tokens)


def weigh_scales(each: Tensor, counts: Sequence[int], power: float) -> Tensor:
    """Return the weighted mean of the scales' losses for each sample.

    Args:
        each: (B, S).
        counts: Tokens of each scale; more than S are ignored.
        power: A scale of N tokens weighs N to this power.

    Returns:
        (B,).
    """
    weights = torch.tensor(counts[: each.shape[1]], device=each.device).float() ** power  # (S,)
    return each @ (weights / weights.sum())
