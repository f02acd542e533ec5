"""How often the codes of a tokenizer are used: shares, perplexities, and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

PANEL = (260, 150)  # width and height of one scale's plot, pixels
MARGIN = 18


class CodebookUsage:
    """Count codes, scale by scale.

    Args:
        num_scales: Scales S.
        num_codes: Codes V; for tokens of d bits it is 2 d, and bit i counts as code 2 i or 2 i + 1.
        bits: Whether tokens are rows of bits.
    """

    def __init__(self, num_scales: int, num_codes: int, bits: bool = False) -> None:
        self.counts = torch.zeros(num_scales, num_codes, dtype=torch.float64)  # (S, V)
        self.bits = bits

    def add(self, indices: Sequence[Tensor]) -> None:
        """Count the tokens of a batch: (B, N_s), or (B, N_s, d) bits, for each scale."""
        for count, tokens in zip(self.counts, indices, strict=True):
            if self.bits:
                tokens = tokens + 2 * torch.arange(tokens.shape[-1], device=tokens.device)  # (B, N, d)
            count += torch.bincount(tokens.flatten().cpu(), minlength=len(count))

    def summary(self) -> dict[str, float]:
        """Summarize the counts.

        Returns:
            `tokens`; for codes `used`, the share that occurs at all, and `perplexity`, the number of equally likely
            codes with the same entropy; for bits `bit_entropy`, their mean entropy in bits.
        """
        total = self.counts.sum(0)  # (V,)
        if self.bits:
            entropy = _entropy(total.unflatten(0, (-1, 2))) / math.log(2)  # (d,)
            return {"tokens": float(total.sum()) / (len(total) / 2), "bit_entropy": float(entropy.mean())}
        used, perplexity = float((total > 0).double().mean()), float(_entropy(total).exp())
        return {"tokens": float(total.sum()), "used": used, "perplexity": perplexity}

    def plot(self, path: Path) -> None:
        """Draw a panel for each scale: its codes from the most to the least frequent (logarithmic), with figures."""
        width, height = PANEL
        image = Image.new("RGB", (width, height * len(self.counts)), "white")
        draw = ImageDraw.Draw(image)
        for scale, count in enumerate(self.counts):
            top, bottom = scale * height + MARGIN + 12, (scale + 1) * height - MARGIN
            shares = (count / count.sum().clamp(min=1)).sort(descending=True).values  # (V,)
            columns = torch.linspace(0, len(shares) - 1, width - 2 * MARGIN).round().long()  # (X,)
            low = math.log(1e-6)
            heights = 1 - shares[columns].clamp(min=1e-6).log() / low  # (X,) of 1e-6 to 1
            for x, share in enumerate(heights.tolist()):
                draw.line((MARGIN + x, bottom, MARGIN + x, bottom - share * (bottom - top)), fill=(70, 110, 180))
            draw.line((MARGIN, bottom, width - MARGIN, bottom), fill="black")
            used, perplexity = float((count > 0).double().mean()), float(_entropy(count).exp())
            title = f"scale {scale + 1}: {100 * used:.1f} % used, perplexity {perplexity:.0f} of {len(count)}"
            draw.text((MARGIN, top - 16), title, fill="black")
        image.save(path)


def _entropy(counts: Tensor) -> Tensor:
    """Return the entropy in nats over the last axis of counts."""
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1)  # (..., V)
    return -torch.xlogy(p, p).sum(-1)
