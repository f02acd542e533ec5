"""Measure once which layers need their history, keep it in a file, and plan the cache for any budget with it.

ScaleKV (arXiv 2505.19602) separates drafters from refiners by how widely they attend over the history; its code comes
with the result for two models, not with the measurement. We measure what a plan is meant to save: with the history
ranked by the very scores that compression uses, how much of the next scale's attention falls on tokens beyond the c
best, for each layer, scale and c. A budget is then divided such that the attention lost by all layers together is the
least; a layer that attends widely gets much (a drafter), one that attends to little or to its own scale gets little.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from os import PathLike

import torch
from torch import Tensor, nn

from dit.cache.plan import MIN_REFINER_FRACTION, histories
from dit.cache.policies import attention_mass, smooth_scores, spread_positions
from dit.layers.scales import Grid, token_counts
from dit.runtime.artifacts import ArtifactHeader, read_artifact, write_artifact

STEPS = 64
"""Parts of a history at which the lost attention is kept."""

KIND = "kv_profile"


@dataclass(frozen=True)
class KVProfile:
    """How much attention each layer loses when it keeps a part of its history.

    Args:
        lost: (S, L, STEPS + 1), float32 in [0, 1]: mean attention that falls on forgotten tokens when a scale begins
            with 0, 1/STEPS, ..., all of the history.
        grids: the schedule it was measured on.
        images: rows that were measured.
    """

    lost: Tensor
    grids: tuple[Grid, ...]
    images: int

    def divide(self, scale: int, average: int, held: int) -> list[int]:
        """Divide tokens among layers such that together they lose the least attention.

        Args:
            scale: index of the scale that begins.
            average: tokens of an average layer.
            held: tokens of the whole history.

        Returns:
            Tokens of each layer; their sum is `average` times the layers.
        """
        lost = self.lost[scale].double()  # (L, STEPS + 1)
        floor = max(int(MIN_REFINER_FRACTION * average), 1)
        row = [floor] * len(lost)
        slopes = [_falling_slopes(curve) for curve in lost]
        steps = [(-slopes[layer][part], layer, part) for layer in range(len(lost)) for part in range(STEPS)]
        left = average * len(lost) - sum(row)
        for _, layer, part in sorted(steps):
            reached = round((part + 1) * held / STEPS)
            added = min(max(reached - row[layer], 0), left)
            row[layer] += added
            left -= added
        return row

    def drafters(self, scale: int, average: int, held: int) -> list[int]:
        """Return layers that get more than the average when a scale begins."""
        return [layer for layer, kept in enumerate(self.divide(scale, average, held)) if kept > average]

    def save(self, path: str | PathLike[str], transformer: nn.Module) -> None:
        """Write the profile, with the fingerprint of the network that it was measured on."""
        data = {"grids": [list(grid) for grid in self.grids], "pictures": self.images}
        write_artifact(path, _header(transformer, self.grids), {"lost": self.lost}, data)

    @classmethod
    def load(cls, path: str | PathLike[str], transformer: nn.Module, any_weights: bool = False) -> KVProfile:
        """Read a profile that fits a network.

        Args:
            path: of the file.
            transformer: the network at hand.
            any_weights: accept other weights of the same architecture, such as a fine-tuned model's.

        Raises:
            ArtifactError: it was measured on something else.
            FileNotFoundError: there is no such file.
        """
        header, tensors, data = read_artifact(path)
        grids = tuple((int(rows), int(columns)) for rows, columns in (data or {}).get("grids", ()))
        header.check(_header(transformer, grids or ((0, 0),)), any_weights=any_weights)
        return cls(tensors["lost"], grids, int(data["pictures"]))


class KVCalibrator:
    """Measure a `KVProfile` in runs with a full cache; the `observer` of `ScaleKVCache`.

    Args:
        grids: rows and columns of each scale.
        num_layers: layers L.
        observe: queries that rank the history, as in the plans to come.
        pool: width of the maximum over neighbours, as in the plans to come.
    """

    def __init__(self, grids: tuple[Grid, ...], num_layers: int, observe: int = 16, pool: int = 5) -> None:
        self.grids, self.observe, self.pool = grids, observe, pool
        self.past = histories(token_counts(grids))
        self.sums = torch.zeros(len(grids), num_layers, STEPS + 1, dtype=torch.float64)
        self.rows = torch.zeros(len(grids), num_layers, dtype=torch.int64)
        self._ranked: dict[int, Tensor] = {}  # places of each layer's history, best first, (B, K, M)

    @torch.no_grad()
    def __call__(self, layer: int, scale: int, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Measure a layer at a scale; see `Observer`.

        Raises:
            ValueError: the cache forgets tokens, so that there is nothing to compare with.
        """
        query, keys = query.transpose(1, 2), keys.transpose(1, 2)  # (B, K, N, E), (B, K, M, E)
        if keys.shape[2] != self.past[scale] + query.shape[2]:
            raise ValueError("calibration needs runs with kv_policy='full': there are fewer keys than tokens so far")
        if scale and layer in self._ranked:
            history = self.past[scale]
            weights = attention_mass(query, keys) / query.shape[2]  # (B, K, M), mean over queries
            mass = weights[..., :history].gather(2, self._ranked.pop(layer))  # (B, K, M'), best first
            kept = torch.cat([torch.zeros_like(mass[..., :1]), mass.cumsum(2)], dim=2)  # (B, K, M' + 1)
            indices = torch.linspace(0, history, STEPS + 1).round().long().to(kept.device)  # (STEPS + 1,)
            lost = (kept[..., -1:] - kept[..., indices]).clamp_min(0).mean((0, 1))  # (STEPS + 1,)
            self.sums[scale, layer] += lost.double().cpu() * len(query)
            self.rows[scale, layer] += len(query)
        if scale < len(self.grids) - 1:
            observers = spread_positions(self.grids[scale], query.shape[2], self.observe).to(keys.device)  # (W,)
            scores = smooth_scores(attention_mass(query[:, :, observers], keys), self.pool)  # (B, K, M)
            self._ranked[layer] = scores.argsort(-1, descending=True)

    def profile(self) -> KVProfile:
        """Return the profile of what was measured so far.

        Raises:
            ValueError: nothing was.
        """
        if not self.rows[1:].all():
            raise ValueError("nothing was measured yet: generate with this calibrator as the cache's observer first")
        lost = (self.sums / self.rows.clamp_min(1)[..., None]).float()  # (S, L, STEPS + 1)
        return KVProfile(lost, tuple(self.grids), int(self.rows.max()))


def _falling_slopes(curve: Tensor) -> list[float]:
    """Return the slopes of a falling curve's lower convex hull, one a part."""
    values = curve.tolist()
    hull = [0]
    for point in range(1, len(values)):
        hull.append(point)
        while len(hull) > 2:
            a, b, c = hull[-3:]
            if (values[b] - values[a]) * (c - b) < (values[c] - values[b]) * (b - a):
                break
            del hull[-2]  # b lies above the line from a to c
    slopes: list[float] = []
    for a, b in pairwise(hull):
        slopes += [(values[a] - values[b]) / (b - a)] * (b - a)
    return slopes


@dataclass(frozen=True)
class _Schedule:
    """A schedule of scales with the attributes of a scheduler that an artifact header reads."""

    config: dict[str, list[list[int]]]


def _header(transformer: nn.Module, grids: tuple[Grid, ...]) -> ArtifactHeader:
    schedule = _Schedule({"grids": [list(grid) for grid in grids]})
    return ArtifactHeader.of(KIND, transformer, schedule, (1, *grids[-1]), ())
