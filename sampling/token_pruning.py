"""Leave out the tokens of large scales that say least, and fill in what an earlier scale's layers said there (FastVAR).

Section 3 of arXiv 2503.23367. In the layers of the middle, attention, look at the text and MLP each work on the
tokens that lie farthest from the map's mean only: those with detail. What they would have given for the others is
taken from the same layer at an earlier scale, enlarged. Only the tokens that were worked on leave keys and values.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dit.layers.scales import Grid
from dit.runtime.attachment import AttachError, Attachment, Mechanism
from dit.runtime.coordinates import current_coordinates
from dit.runtime.stages import Resource, Stage

MIDDLE = (3 / 32, 28 / 32)
"""First and last pruned layer as shares of the depth; layers 3 to 27 of the 32 of Infinity-2B."""


def choose_detailed(x: Tensor, count: int) -> Tensor:
    """The tokens that lie farthest from the mean of their map.

    Args:
        x: (B, N, D).
        count: how many.

    Returns:
        Rising places, (B, count).
    """
    distance = (x - x.mean(1, keepdim=True)).float().square().sum(-1)  # (B, N)
    return distance.topk(count, dim=1).indices.sort(1).values  # (B, n)


def take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, N, D) at places (B, n): (B, n, D)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def fill(worked: Tensor, places: Tensor, earlier: Tensor, grid: Grid, earlier_grid: Grid) -> Tensor:
    """A whole map from some tokens and an earlier, smaller map.

    Args:
        worked: tokens that were worked on, (B, n, D).
        places: where they belong, (B, n).
        earlier: all tokens of the earlier scale, (B, N', D).
        grid: rows and columns of the scale.
        earlier_grid: of the earlier scale.

    Returns:
        (B, N, D).
    """
    small = earlier[: len(worked)].transpose(1, 2).unflatten(2, earlier_grid)  # (B, D, h', w'); guidance may be off now
    whole = F.interpolate(small, size=grid, mode="area").flatten(2).transpose(1, 2)  # (B, N, D)
    return whole.scatter(1, places[..., None].expand_as(worked), worked.to(whole.dtype))


class TokenPruning(Mechanism):
    """FastVAR's pruning on a `NextScaleTransformer`.

    Args:
        shares: scale -> share of its tokens to leave out, above 0 and below 1.
        source: the scale whose results fill the gaps; must come before all of `shares`.
        grids: rows and columns of each scale.
        layers: first and last layer to prune as shares of the depth.

    Raises:
        ValueError: a share out of range, no scale, or a source that comes too late.
    """

    name: ClassVar[str] = "token_pruning"
    stage: ClassVar[Stage] = Stage.CACHE
    exclusive: ClassVar[frozenset[Resource]] = frozenset({Resource.TOKENS})

    def __init__(
        self,
        shares: dict[int, float],
        source: int,
        grids: tuple[Grid, ...],
        layers: tuple[float, float] = MIDDLE,
    ) -> None:
        wrong = [share for share in shares.values() if not 0 < share < 1]
        if not shares or wrong:
            raise ValueError(f"shares of tokens to leave out are {wrong or 'missing'}; expected above 0 and below 1")
        if not 0 <= source < min(shares) or max(shares) >= len(grids):
            raise ValueError(
                f"scale {source} cannot fill the gaps of the scales {sorted(shares)} of {len(grids)}: name a scale "
                "before all of them"
            )
        self.shares, self.source, self.grids, self.layers = dict(shares), source, grids, layers
        self.worked = self.given = 0

    def install(self, attachment: Attachment) -> None:
        """Wrap the parts of the blocks; see `Mechanism.install`."""
        for component, model in attachment.models.items():
            blocks = getattr(model, "transformer_blocks", None)
            if blocks is None or not hasattr(blocks[0], "norm1") or not hasattr(blocks[0].attn, "log_sharpness"):
                raise AttachError(f"{type(model).__name__} is no next-scale transformer; token pruning needs one")
            first, last = (round(share * len(blocks)) for share in self.layers)
            for index in range(first, max(last, first + 1)):
                self._wrap(attachment, blocks[index], f"{component}.{index}")

    def _wrap(self, attachment: Attachment, block: nn.Module, layer: str) -> None:
        parts: list[tuple[str, Any, Any]] = [("attn", block.norm1, block.attn), ("ff", block.norm2, block.ff)]
        if block.cross_attn is not None:
            parts.append(("cross_attn", block.norm_cross, block.cross_attn))
        for name, norm, part in parts:
            seen: dict[str, Tensor] = {}  # the stream before the norm: what tokens are chosen by

            def look(_: nn.Module, args: tuple, kwargs: dict, seen: dict[str, Tensor] = seen) -> None:
                seen["x"] = args[0]

            def work(
                forward: Any, normed: Tensor, *rest: Any, key: str = f"{layer}.{name}", seen: dict[str, Tensor] = seen
            ) -> Tensor:
                return self._work(attachment, key, forward, seen.pop("x"), normed, rest)

            attachment.before(norm, look)
            attachment.around(part, work)

    def _work(
        self, attachment: Attachment, key: str, forward: Any, x: Tensor, normed: Tensor, rest: tuple[Any, ...]
    ) -> Tensor:
        """Run a part of a block on all tokens or on some, (B, N, D)."""
        here = current_coordinates()
        scale = None if here is None else here.scale
        if scale is None:
            attachment.skip("the loop said no scale")
        elif scale in self.shares:
            earlier = attachment.state.get(self.name, key, "all")
            if earlier is not None:
                return self._prune(key, forward, x, normed, rest, earlier, scale)
            attachment.skip(f"scale {self.source} was not run before scale {scale}")
        out = forward(normed, *rest)  # (B, N, D)
        if scale == self.source:
            attachment.state.set(self.name, key, "all", out)
        return out

    def _prune(
        self, key: str, forward: Any, x: Tensor, normed: Tensor, rest: tuple[Any, ...], earlier: Tensor, scale: int
    ) -> Tensor:
        count = normed.shape[1] - int(normed.shape[1] * self.shares[scale])
        places = choose_detailed(x, count)  # (B, n)
        if key.endswith(".attn") and len(rest) > 2 and rest[2] is not None:
            rest = (*rest[:2], tuple(part[places] for part in rest[2]))  # angles of the tokens that are left, (B, n, E)
        worked = forward(take(normed, places), *rest)  # (B, n, D)
        self.worked += count
        self.given += normed.shape[1]
        return fill(worked, places, earlier, self.grids[scale], self.grids[self.source])

    def counts(self) -> dict[str, int]:
        """Tokens that pruned calls worked on, of those they were given."""
        return {"worked_tokens": self.worked, "given_tokens": self.given}

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Tokens that pruned calls worked on, of those they were given."""
        return dict(self.counts())
