"""What a correction is: what it is given, what it returns, when it wants the dense result, and what it keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.kernels.contract import Tail
from dit.runtime.state import StateStore
from dit.runtime.step_context import StepContext

CORRECTIONS: dict[str, str] = {
    "none": "plain",
    "pooled_tail": "pooled",
    "linear_complement": "linear",
    "residual": "residual",
    "ratio_residual": "residual",
    "linear": "linear",
}
"""Correction -> the file of this folder that registers it."""

_TABLE: dict[str, type[Correction]] = {}

Kind = TypeVar("Kind", bound="Correction")


class SparseCall(Protocol):
    """Computes the block map of a call; as often as it is called."""

    def __call__(self, *, tail: Tail | None = None, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the output (B, N, K, E) and the LSE (B, K, N), float32, or None if it wasn't asked for."""
        ...


class DenseCall(Protocol):
    """Computes attention of all to all (dead keys left out)."""

    def __call__(self, *, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the output (B, N, K, E) and the LSE (B, K, N), float32, or None if it wasn't asked for."""
        ...


@dataclass(frozen=True)
class StateEntry:
    """What a correction keeps for one layer and branch, in the store of the mechanism that calls it.

    Args:
        store: of the attachment.
        mechanism: name under which the values are kept.
        layer: key of the layer; where groups of heads are corrected one by one, it says which group too.
        branch: see `StepContext.branch`.
    """

    store: StateStore
    mechanism: str
    layer: str
    branch: str

    def get(self) -> dict[str, Any] | None:
        """Return what was kept in this run, on the device where it is kept; None if there is nothing."""
        return self.store.get(self.mechanism, self.layer, self.branch)

    def set(self, value: dict[str, Any]) -> None:
        """Keep tensors and numbers by name until the run ends; replaces what was kept."""
        self.store.set(self.mechanism, self.layer, self.branch, value)


@dataclass(frozen=True, eq=False)
class CorrectionCall:
    """One call of sparse attention that is to be corrected.

    Args:
        query: (B, N, K, E), in the order of the sequence, after rotary embeddings.
        key: (B, M, K, E).
        value: (B, M, K, E).
        block_map: the pairs that are computed, on the query's device.
        scale: factor of the scores.
        sparse: computes these pairs.
        dense: computes all pairs.
        key_mask: bool, (B, M), False for keys that nobody may look at.
        step: the step of the call; corrections that keep something need it.
        state: where they keep it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    block_map: BlockMap
    scale: float
    sparse: SparseCall
    dense: DenseCall
    key_mask: Tensor | None = None
    step: StepContext | None = None
    state: StateEntry | None = None


class Correction(ABC):
    """What stands for the pairs that a map leaves out. Subclasses are frozen dataclasses of their parameters.

    Attributes:
        name: as `correction` takes it.
        paper: where it was published; empty for common knowledge.
        keeps_state: it keeps tensors between steps, and calls `dense` at steps that refresh them. Such a call needs
            `step` and `state`.
        work: nanoseconds that it adds for each number of the queries, about, on one core of a CPU.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    keeps_state: ClassVar[bool] = False
    work: ClassVar[float] = 0.0

    @abstractmethod
    def __call__(self, call: CorrectionCall) -> Tensor:
        """Return the corrected output, (B, N, K, E) in the query's dtype.

        Raises:
            ValueError: it keeps state, and the call has no step or no state.
        """

    def must_refresh(self, query: Tensor, step: StepContext | None, state: StateEntry | None) -> bool:
        """Return whether the call of this step computes the dense result.

        Args:
            query: (B, N, K, E); what is kept of another shape doesn't count.
            step: the step.
            state: of the layer and branch; without anything kept, corrections that keep state must refresh.
        """
        return False

    def anchors(self, sigmas: Sequence[float]) -> list[int]:
        """Return the steps at which a run refreshes: those that a step cache should not skip.

        Args:
            sigmas: noise levels of the steps that run under a sparse plan, the first of a run first.
        """
        return []

    def refresh_share(self, num_steps: int) -> float:
        """Return which share of the steps of a run compute the dense result too, about."""
        return 0.0

    def extra_density(self, density: float, block: int) -> float:
        """Return the share of all pairs that it has the kernel compute besides those of the map.

        Args:
            density: of the map.
            block: tokens of a block of keys.
        """
        return 0.0

    @property
    def joins_heads(self) -> bool:
        """Whether each head is corrected by itself, by the same parameters, so that any can be corrected together."""
        return True

    def kept_bytes(self, query: Tensor) -> int:
        """Return how many bytes one layer and branch keeps for queries (B, N, K, E)."""
        return 0

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Return the names of the parameters with their defaults; those without one have `dataclasses.MISSING`."""
        return {field.name: field.default for field in fields(cls)}  # pyright: ignore[reportArgumentType]


def register_correction(kind: type[Kind]) -> type[Kind]:
    """Add a correction to the table; a decorator of its class."""
    _TABLE[kind.name] = kind
    return kind


def correction_names() -> list[str]:
    """Return the names of all corrections."""
    return list(CORRECTIONS)


def correction_type(name: str) -> type[Correction]:
    """Return the class of a correction.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in CORRECTIONS:
        raise ValueError(f"there is no correction {name!r}; use one of {', '.join(CORRECTIONS)}")
    import_module(f"dit.attention.corrections.{CORRECTIONS[name]}")
    return _TABLE[name]


def correction(name: str, **params: Any) -> Correction:
    """Return a correction.

    Args:
        name: one of `correction_names()`.
        **params: see `correction_type(name).parameters()`.

    Raises:
        ValueError: an unknown name or parameter, or a value out of its range.
    """
    kind = correction_type(name)
    known = kind.parameters()
    unknown = sorted(set(params) - set(known))
    if unknown:
        accepted = ", ".join(known) or "no parameters"
        raise ValueError(f"correction {name!r} takes no {', '.join(unknown)}; it takes {accepted}")
    return kind(**params)
