"""Windows of a token grid: cut out, shifted, padded where they don't fit, and pooled into fewer tokens.

Shifted windows are those of Swin (arXiv 2103.14030, section 3.2): the grid is rolled, and a mask keeps apart what the
roll brought together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Sizes = tuple[int, int, int]
"""Along frames, rows and columns."""


@dataclass(frozen=True, slots=True)
class Windows:
    """A cut of a grid into windows.

    Args:
        grid: tokens (T, H, W); the sequence is row-major.
        window: tokens of a window along each axis.
        shift: by how much the windows are moved; less than a window.
    """

    grid: Sizes
    window: Sizes
    shift: Sizes = (0, 0, 0)

    @property
    def counts(self) -> Sizes:
        """Windows along each axis; the last ones may be incomplete and are padded."""
        frames, rows, columns = (-(-size // side) for size, side in zip(self.grid, self.window, strict=True))
        return frames, rows, columns

    @property
    def tokens(self) -> int:
        """Tokens n of a window."""
        return math.prod(self.window)

    @property
    def is_padded(self) -> bool:
        """Whether some windows are incomplete."""
        return any(size % side for size, side in zip(self.grid, self.window, strict=True))

    def split(self, tokens: Tensor) -> Tensor:
        """Cut a sequence (B, N, ...) into windows (B G, n, ...), G of them a sample; padding is zero."""
        x = tokens.unflatten(1, self.grid)  # (B, T, H, W, ...)
        if self.is_padded:
            padding = [(-size) % side for size, side in zip(self.grid, self.window, strict=True)]
            behind = [0, 0] * (x.ndim - 4)  # F.pad begins with the last axis
            x = F.pad(x, [*behind, *(number for one in reversed(padding) for number in (0, one))])
        if any(self.shift):
            x = x.roll([-by for by in self.shift], (1, 2, 3))
        (f, h, w), (t, y, z) = self.counts, self.window
        x = x.reshape(len(x), f, t, h, y, w, z, *x.shape[4:])  # (B, f, t, h, y, w, z, ...)
        x = x.permute(0, 1, 3, 5, 2, 4, 6, *range(7, x.ndim))  # (B, f, h, w, t, y, z, ...)
        return x.flatten(4, 6).flatten(0, 3)  # (B G, n, ...)

    def join(self, windows: Tensor) -> Tensor:
        """Undo `split`: (B G, n, ...) to (B, N, ...), without the padding."""
        (f, h, w), (t, y, z) = self.counts, self.window
        x = windows.reshape(-1, f, h, w, t, y, z, *windows.shape[2:])  # (B, f, h, w, t, y, z, ...)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, *range(7, x.ndim))  # (B, f, t, h, y, w, z, ...)
        x = x.reshape(len(x), f * t, h * y, w * z, *windows.shape[2:])  # (B, T', H', W', ...)
        if any(self.shift):
            x = x.roll(self.shift, (1, 2, 3))
        frames, rows, columns = self.grid
        return x[:, :frames, :rows, :columns].flatten(1, 3)  # (B, N, ...)

    def mask(self, device: torch.device | None = None) -> Tensor | None:
        """Return who may look at whom in each window, bool (G, n, n); None if all may.

        Padding looks at padding, so that no query is left without a key.
        """
        if not self.is_padded and not any(self.shift):
            return None
        frames, rows, columns = (count * side for count, side in zip(self.counts, self.window, strict=True))
        padded = Windows((frames, rows, columns), self.window)
        labels = self.split(self._real(device))  # (G, n)
        for axis, (size, by) in enumerate(zip(padded.grid, self.shift, strict=True)):
            wrapped = torch.arange(size, device=device) >= size - by  # what the roll brought to the end
            wrapped = wrapped.view([-1 if a == axis else 1 for a in range(3)]).expand(padded.grid)  # (T', H', W')
            labels = labels + padded.split(wrapped.reshape(1, -1).long()) * 2 ** (axis + 1)  # (G, n)
        return labels[:, :, None] == labels[:, None, :]  # (G, n, n)

    def pool(self, tokens: Tensor, groups: Sizes) -> tuple[Tensor, Tensor | None]:
        """Average each window into a few tokens.

        Token number i along an axis goes to group i mod g, so a group is spread over the window, as in the released
        PT-DiT; with one group a window, the mean of the window.

        Args:
            tokens: (B, N, D).
            groups: tokens that remain of a window along each axis; divisors of the window.

        Returns:
            The averages (B, P, D), P = G times the product of `groups`; and bool (P,), False where a group holds
            nothing but padding, or None if there is no padding.
        """
        real = self.split(self._real(tokens.device))[None, ..., None] if self.is_padded else None  # (1, G, n, 1)
        windows = self.split(tokens).unflatten(0, (len(tokens), -1))  # (B, G, n, D)
        sums = self._grouped(windows, groups)  # (B, P, D)
        if real is None:
            return sums / (self.tokens // math.prod(groups)), None
        counts = self._grouped(real, groups)  # (1, P, 1)
        return sums / counts.clamp(min=1).to(sums.dtype), counts[0, :, 0] > 0

    def _grouped(self, windows: Tensor, groups: Sizes) -> Tensor:
        """Sum the tokens of each group: (B, G, n, D) to (B, P, D)."""
        (a, b, c), (t, y, z) = groups, self.window
        x = windows.unflatten(2, (t // a, a, y // b, b, z // c, c))  # (B, G, t/a, a, y/b, b, z/c, c, D)
        return x.sum(dim=(2, 4, 6)).flatten(1, 4)  # (B, P, D)

    def _real(self, device: torch.device | None) -> Tensor:
        """Return ones for the tokens of one sample, (1, N), int64; `split` pads them with zeros."""
        return torch.ones(1, math.prod(self.grid), dtype=torch.long, device=device)
