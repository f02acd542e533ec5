"""What the map leaves out is taken from the last dense step (DiTFastAttn, Re-ttention).

At a refresh the dense result is computed beside the sparse one. `residual` keeps their difference
(DiTFastAttn, arXiv 2406.08552) and adds it at the steps that follow. `ratio_residual` (Re-ttention, arXiv 2505.22918)
also keeps which share of a query's softmax the map sees, which makes the sparse result of the size that it has in the
dense one:

    ratio = exp(lse_sparse - lse_dense)         residual = dense - ratio sparse         at a refresh
    out = (ratio + drift steps) sparse + residual                                       afterwards

The published code takes the ratio from a matrix of all scores; the two LSEs give the same with any kernel. It adds the
drift once for each step since the first sparse one, and doesn't clip the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dit.attention.corrections.contract import Correction, CorrectionCall, StateEntry, register_correction
from dit.runtime.step_context import StepContext

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@register_correction
@dataclass(frozen=True)
class Residual(Correction):
    """Add what was missing at the last refresh (DiTFastAttn's residual of window attention).

    Args:
        refresh_every: refresh at steps that are a multiple of it, and at the first sparse step of a run. A refresh that
            a step cache skips takes place at the next step that is computed.
        refresh_sigmas: refresh at the first steps whose sigma is at most one of these, in place of `refresh_every`.
        dtype: of what is kept; "auto" is that of the queries.
        device: where it is kept; "cpu" spares the memory of an accelerator, and costs two copies a step.
    """

    refresh_every: int = 5
    refresh_sigmas: tuple[float, ...] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    name: ClassVar[str] = "residual"
    paper: ClassVar[str] = "arXiv 2406.08552"
    work: ClassVar[float] = 2.0
    keeps_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every is {self.refresh_every}; use at least 1, which computes no sparse step")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}")
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device is {self.device!r}; use 'auto' or 'cpu'")
        if self.refresh_sigmas is not None:
            object.__setattr__(self, "refresh_sigmas", tuple(self.refresh_sigmas))  # plans read them from JSON
            if not self.refresh_sigmas or any(not sigma >= 0 for sigma in self.refresh_sigmas):
                raise ValueError(f"refresh_sigmas is {self.refresh_sigmas}; use one or more numbers of at least 0")

    def __call__(self, call: CorrectionCall) -> Tensor:
        """Return the corrected output; at a refresh the dense one."""
        step, state = self._needed(call.step, call.state)
        if self.must_refresh(call.query, step, state):
            return self._refresh(call, step, state)
        kept = state.get() or {}
        return self._combine(call.sparse()[0].float(), kept, step).to(call.query.dtype)

    def must_refresh(self, query: Tensor, step: StepContext | None, state: StateEntry | None) -> bool:
        """Return whether this step computes the dense result: nothing that fits is kept, or a refresh is due."""
        step, state = self._needed(step, state)
        kept = state.get()
        if kept is None or kept["residual"].shape != query.shape:
            return True
        if step.step == kept["refreshed"]:  # asked again at the same step
            return True
        return self._interval(step.step, step.sigma) != kept["interval"]

    def anchors(self, sigmas: Sequence[float]) -> list[int]:
        """Return the steps at which a run refreshes."""
        intervals = [self._interval(step, sigma) for step, sigma in enumerate(sigmas)]
        return [step for step, one in enumerate(intervals) if step == 0 or one != intervals[step - 1]]

    def refresh_share(self, num_steps: int) -> float:
        """Return which share of the steps of a run refresh, about."""
        if self.refresh_sigmas is None:
            return 1 / self.refresh_every
        return min(len(self.refresh_sigmas) / max(num_steps, 1), 1.0)

    def kept_bytes(self, query: Tensor) -> int:
        """Return how many bytes one layer and branch keeps."""
        return query.numel() * (DTYPES[self.dtype] or query.dtype).itemsize

    def _interval(self, step: int, sigma: float) -> int:
        """Return how many refreshes were due at or before a step."""
        if self.refresh_sigmas is None:
            return step // self.refresh_every
        if math.isnan(sigma):
            raise ValueError(
                "refresh_sigmas is set, but the scheduler says no sigma of this step; use refresh_every instead"
            )
        return sum(sigma <= boundary for boundary in self.refresh_sigmas)

    def _refresh(self, call: CorrectionCall, step: StepContext, state: StateEntry) -> Tensor:
        dense, kept = self._difference(call)
        device = torch.device("cpu") if self.device == "cpu" else call.query.device
        kept = {name: one.to(device) for name, one in kept.items()}
        numbers = {"interval": self._interval(step.step, step.sigma), "refreshed": step.step}
        state.set({**kept, **numbers})
        return dense

    def _difference(self, call: CorrectionCall) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the dense output and what to keep."""
        dense, sparse = call.dense()[0], call.sparse()[0]
        return dense, {"residual": self._as_kept(dense.float() - sparse.float(), call)}

    def _combine(self, sparse: Tensor, kept: dict[str, Any], step: StepContext) -> Tensor:
        """Return the output of a step between refreshes, in float32, (B, N, K, E)."""
        return sparse + kept["residual"].to(sparse.device, torch.float32)

    def _as_kept(self, residual: Tensor, call: CorrectionCall) -> Tensor:
        return residual.to(DTYPES[self.dtype] or call.query.dtype)

    def _needed(self, step: StepContext | None, state: StateEntry | None) -> tuple[StepContext, StateEntry]:
        if step is None or state is None:
            missing = "step context" if step is None else "place to keep its tensors"
            raise ValueError(
                f"correction {self.name!r} has no {missing}: it works between the steps of a run; generate through a "
                "pipeline, call inside step_scope, or use the correction 'pooled_tail', which keeps nothing"
            )
        return step, state


@register_correction
@dataclass(frozen=True)
class RatioResidual(Residual):
    """Scale the sparse result to its share of the softmax, and add what was missing then (Re-ttention).

    Args:
        refresh_every: see `Residual`.
        refresh_sigmas: see `Residual`.
        dtype: see `Residual`; ratios are float32.
        device: see `Residual`.
        drift: how much the ratio grows with each step after the first sparse one.
        clip: most that the ratio may be; None for no bound, as published.
    """

    drift: float = 0.04
    clip: float | None = 1.0
    name: ClassVar[str] = "ratio_residual"
    paper: ClassVar[str] = "arXiv 2505.22918"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.drift >= 0:
            raise ValueError(f"drift is {self.drift}; use a number of at least 0")
        if self.clip is not None and not self.clip >= 1:
            raise ValueError(f"clip is {self.clip}; use a number of at least 1, or None")

    def kept_bytes(self, query: Tensor) -> int:
        """Return how many bytes one layer and branch keeps."""
        return super().kept_bytes(query) + 4 * query.shape[:-1].numel()

    def _difference(self, call: CorrectionCall) -> tuple[Tensor, dict[str, Tensor]]:
        dense, dense_lse = call.dense(return_lse=True)
        sparse, sparse_lse = call.sparse(return_lse=True)
        if dense_lse is None or sparse_lse is None:
            raise ValueError("a call of sparse or dense returned no LSE though it was asked for one")
        ratio = (sparse_lse - dense_lse.masked_fill(dense_lse.isneginf(), 0)).exp()  # (B, K, N), 0 without keys
        residual = dense.float() - _by_token(ratio) * sparse.float()  # (B, N, K, E)
        return dense, {"residual": self._as_kept(residual, call), "ratio": ratio}

    def _combine(self, sparse: Tensor, kept: dict[str, Any], step: StepContext) -> Tensor:
        ratio = kept["ratio"].to(sparse.device) + self.drift * (step.step - kept["refreshed"] - 1)  # (B, K, N)
        ratio = ratio if self.clip is None else ratio.clamp(max=self.clip)
        return _by_token(ratio) * sparse + kept["residual"].to(sparse.device, torch.float32)


def _by_token(ratio: Tensor) -> Tensor:
    """Bring a factor of each query and head (B, K, N) to (B, N, K, 1)."""
    return ratio.transpose(1, 2)[..., None]
