"""Profile of a model: inner products of its predictions at any two noise levels.

From the Gram matrix `G[j, k] = <F_j, F_k> / numbers` of predictions F along a run follows the error of every forecast:
with weights w of the computed steps A it is `G_jj - 2 w G_Aj + w G_AA w`. So the best steps to compute for any budget
are found without generating another image: a shortest path over the two newest computed steps.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from os import PathLike
from typing import Literal

import numpy as np
import torch
from torch import nn

from dit.runtime.artifacts import ArtifactError, ArtifactHeader, model_fingerprint, read_artifact, write_artifact
from sampling.step_cache.schedule import Errors, best_steps

KIND = "step_cache_profile"
RegionName = Literal["output", "blocks"]
"""Regions that a profile can be calibrated for: `Output()` and `Blocks(head=0)` of `sampling.step_cache.regions`."""
Fill = Literal["reuse", "newton", "gram"]
"""What stands in for skipped steps: `Reuse`, `Newton` of order 1, or `Gram` with two points."""


@dataclass(frozen=True)
class Profile:
    """Likeness of a model's predictions along a run.

    Args:
        header: what it was measured on.
        sigmas: noise levels of the calibration runs, falling, (N,).
        grams: (N, N) for "cond,cond" and, where there was guidance, "uncond,uncond" and "cond,uncond"; where what
            enters the region was seen too, "cond,input", "uncond,input" and "input,input".
        guidance: scale of the calibration runs; 1 where there was none.
        prompts: how many were generated.
        region: of which part of the network the predictions are, "output" or "blocks"; see `calibrate_budget`.
    """

    header: ArtifactHeader
    sigmas: tuple[float, ...]
    grams: dict[str, np.ndarray]
    guidance: float = 1.0
    prompts: int = 0
    region: RegionName = "output"
    _plans: dict[tuple, tuple[bool, ...]] = field(default_factory=dict, repr=False, compare=False)
    _weights: dict[tuple, tuple[float, ...]] = field(default_factory=dict, repr=False, compare=False)

    # -------------------------------------------------------------------------- use

    def gram(self, sigmas: Sequence[float] = (), guidance: float | None = None) -> np.ndarray:
        """Return the Gram matrix of the guided predictions, float64.

        Args:
            sigmas: noise levels of the run, (M,); empty means those of the calibration.
            guidance: scale; None is that of the calibration.

        Returns:
            (M, M).
        """
        scale = self.guidance if guidance is None else guidance
        total = self.grams["cond,cond"].astype(np.float64)  # (N, N)
        if "uncond,uncond" in self.grams:
            both, mixed = self.grams["uncond,uncond"], self.grams["cond,uncond"]
            total = scale**2 * total + (1 - scale) ** 2 * both + scale * (1 - scale) * (mixed + mixed.T)
        if not sigmas or tuple(sigmas) == self.sigmas:
            return total
        spread = interpolation(self.sigmas, sigmas)  # (M, N)
        return spread @ total @ spread.T

    @property
    def has_input(self) -> bool:
        """Whether forecasts also weigh what enters the region at the step itself."""
        return "input,input" in self.grams

    def joint(self, sigmas: Sequence[float] = (), guidance: float | None = None) -> np.ndarray:
        """Return the Gram matrix of the guided predictions and, behind them, what enters the region at each step.

        Args:
            sigmas: as in `gram`.
            guidance: as in `gram`.

        Returns:
            (2 M, 2 M); (M, M) where inputs were not seen.
        """
        total = self.gram(sigmas, guidance)  # (M, M)
        if not self.has_input:
            return total
        scale = self.guidance if guidance is None else guidance
        mixed = self.grams["cond,input"].astype(np.float64)  # (N, N)
        if "uncond,input" in self.grams:
            mixed = scale * mixed + (1 - scale) * self.grams["uncond,input"]
        spread = interpolation(self.sigmas, sigmas or self.sigmas)  # (M, N)
        mixed, entered = (spread @ part @ spread.T for part in (mixed, self.grams["input,input"]))  # (M, M) each
        return np.block([[total, mixed], [mixed.T, entered]])

    def mask(
        self, sigmas: Sequence[float], budget: float, fill: Fill = "gram", guidance: float | None = None
    ) -> tuple[bool, ...]:
        """Return the best steps to compute.

        Args:
            sigmas: noise levels of the run, falling, (M,); empty means those of the calibration.
            budget: largest fraction of the steps that are computed, in (0, 1]; at least one is.
            fill: what stands in for the others.
            guidance: scale of the run; None is that of the calibration.

        Returns:
            True for each step that is computed.

        Raises:
            ValueError: the budget is out of range.
        """
        if not 0 < budget <= 1:
            raise ValueError(f"budget {budget} is outside (0, 1]: it is the fraction of calls that are computed")
        levels = tuple(sigmas) or self.sigmas
        key = (levels, budget, fill, guidance)
        if key not in self._plans:
            count = max(int(budget * len(levels) + 1e-6), 1)
            self._plans[key] = self._best(levels, count, fill, guidance)
        return self._plans[key]

    def _best(self, levels: tuple[float, ...], count: int, fill: Fill, guidance: float | None) -> tuple[bool, ...]:
        if count >= len(levels):
            return (True,) * len(levels)
        gram = self.joint(levels, guidance) if fill == "gram" else self.gram(levels, guidance)
        return best_steps(Errors.of(gram, levels, fill), count)

    def weights(self, anchors: Sequence[float], sigma: float, ridge: float = 1e-5) -> tuple[float, ...]:
        """Return the least-squares weights of predictions at some noise levels for the one at another.

        Args:
            anchors: noise levels of the computed steps, newest first.
            sigma: of the forecast.
            ridge: added to the diagonal, as a fraction of its mean.

        Returns:
            One for each anchor, and one more for what enters the region at `sigma` where the profile knows it.
        """
        key = (*anchors, sigma, ridge)
        if key not in self._weights:  # the same in every run
            gram, wanted = self.joint((*anchors, sigma)), len(anchors)
            columns = [*range(wanted), *([2 * wanted + 1] if self.has_input else [])]
            known = gram[np.ix_(columns, columns)]
            known = known + ridge * np.trace(known) / len(known) * np.eye(len(known))
            self._weights[key] = tuple(np.linalg.solve(known, gram[columns, wanted]).tolist())
        return self._weights[key]

    def magnitude_ratios(self) -> tuple[float, ...]:
        """Return the root mean square of each prediction over that of the step before, 1 for the first (MagCache)."""
        size = np.sqrt(np.diag(self.gram()))
        return (1.0, *(size[1:] / size[:-1]).tolist())

    def check(self, model: nn.Module) -> None:
        """Refuse a profile of another network; sizes, schedulers and step counts may differ, as it is kept in sigma.

        Args:
            model: the network that it is to be used on, wrapped or not.

        Raises:
            ArtifactError: with what differs.
        """
        architecture, weights = model_fingerprint(model)
        if self.header.architecture != architecture:
            reason = "another architecture (or a quantized network)"
        elif self.header.weights != weights:
            reason = "other weights of this architecture"
        else:
            return
        raise ArtifactError(
            f"this step cache profile was measured on {reason}: calibrate anew with calibrate_budget(), or pass "
            "check=False if you know that the networks behave alike"
        )

    # ------------------------------------------------------------------------ files

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as an artifact (float32; 50 steps with guidance take 30 kB).

        Args:
            path: of the file, ending in .safetensors.
        """
        tensors = {name: torch.from_numpy(np.asarray(gram, np.float32)) for name, gram in self.grams.items()}
        data = {"sigmas": self.sigmas, "guidance": self.guidance, "prompts": self.prompts, "region": self.region}
        write_artifact(path, self.header, tensors, data)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Profile:
        """Read a profile.

        Args:
            path: of the file.

        Raises:
            ArtifactError: it is something else.
            FileNotFoundError: there is none.
        """
        header, tensors, data = read_artifact(path)
        if header.kind != KIND:
            raise ArtifactError(f"{path} is a {header.kind!r}, expected a {KIND!r}: calibrate one")
        grams = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        region = data.get("region", "output")  # older files know no other
        return cls(header, tuple(data["sigmas"]), grams, data["guidance"], data["prompts"], region)


def interpolation(known: Sequence[float], wanted: Sequence[float]) -> np.ndarray:
    """Return the matrix that interpolates values at falling levels by local cubics (lines where there are too few).

    Applied to both sides of a Gram matrix it gives that of the interpolated predictions, so errors stay squares.

    Args:
        known: levels, falling, (N,).
        wanted: levels, (M,); beyond the ends the outermost values hold.

    Returns:
        (M, N).
    """
    rising = [-level for level in known]
    if any(later <= level for level, later in pairwise(rising)):
        raise ValueError(f"noise levels must fall strictly, got {tuple(known)}")
    matrix = np.zeros((len(wanted), len(known)))
    width = min(4, len(known))
    for row, level in enumerate(wanted):
        position = min(max(-level, rising[0]), rising[-1])
        first = min(max(bisect.bisect_left(rising, position) - width // 2, 0), len(known) - width)
        points = rising[first : first + width]
        for i, point in enumerate(points):
            others = [other for other in points if other != point]
            matrix[row, first + i] = np.prod([(position - other) / (point - other) for other in others])
    return matrix
