"""AttentionPlan: what each attention layer and head computes at each noise level, as one value and one file.

    plan = AttentionPlan.uniform("sliding_tile", tile=(2, 8, 8), window=(3, 3, 3), guards=Guards(dense_first=0.25))
    with plan.attach(pipe) as handle:
        pipe("a red apple")
    print(handle.report()["layers"])

A plan is a table of choices by (range of noise levels, layer, head), and guards: when attention stays dense whatever
the table says. Noise levels, not step numbers, are its keys, so that it carries to other numbers of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from dit.attention import plan_file
from dit.attention.choices import DENSE, FIRST_FRAME, Choice, Group, Guards, TensorName
from dit.attention.corrections import correction_type
from dit.attention.mechanism import PlannedAttention
from dit.runtime.artifacts import ArtifactError, ArtifactHeader, model_fingerprint
from dit.runtime.hooks import Attachment

__all__ = ["DENSE", "FIRST_FRAME", "AttentionPlan", "Choice", "Guards", "PlanEntry", "TensorName"]


@dataclass(frozen=True)
class PlanEntry:
    """A part of a plan; later ones overwrite earlier ones.

    Args:
        choice: what is computed.
        sigma: lowest and highest noise level of the part; None is all.
        layers: their numbers among those that the plan is for; None is all.
        heads: their numbers; None is all.
    """

    choice: Choice
    sigma: tuple[float, float] | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """A table of choices by noise level, layer and head, and guards.

    Args:
        choices: the different ones.
        table: int16, (bins, layers, heads), numbers of choices; an axis of size 1 stands for all.
        sigma_bins: noise levels that separate the bins, falling; n levels make n + 1 bins. A level itself belongs to
            the bin of more noise.
        guards: see `Guards`.
        grid: the only (frames, rows, columns) that it is for; None is any.
        architecture: fingerprint of the only architecture that it is for; empty is any.
        weights: likewise of the weights.
        tensors: what parameters of choices name.

    Raises:
        ValueError: parts that don't fit each other.
    """

    choices: tuple[Choice, ...]
    table: Tensor
    sigma_bins: tuple[float, ...] = ()
    guards: Guards = field(default_factory=Guards)
    grid: tuple[int, int, int] | None = None
    architecture: str = ""
    weights: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.table.ndim != 3 or self.table.dtype != torch.int16 or not self.table.numel():
            raise ValueError(
                f"table must be int16 (bins, layers, heads), got {self.table.dtype} {tuple(self.table.shape)}"
            )
        if any(later >= level for level, later in pairwise(self.sigma_bins)):
            raise ValueError(f"sigma_bins must fall strictly, got {self.sigma_bins}")
        if self.table.shape[0] not in (1, len(self.sigma_bins) + 1):
            raise ValueError(f"{len(self.sigma_bins)} levels make {len(self.sigma_bins) + 1} bins, "
                             f"the table has {self.table.shape[0]}")  # fmt: skip
        if int(self.table.min()) < 0 or int(self.table.max()) >= len(self.choices):
            raise ValueError(f"the table names choices up to {int(self.table.max())}, there are {len(self.choices)}")
        named = {value.tensor for one in self.choices for value in one.params.values() if isinstance(value, TensorName)}
        missing = sorted(named - set(self.tensors))
        if missing:
            raise ValueError(f"choices name the tensors {', '.join(missing)}, which the plan lacks")

    # ------------------------------------------------------------------------ making

    @classmethod
    def uniform(
        cls,
        name: str,
        /,
        *,
        correction: str | None = None,
        correction_params: Mapping[str, Any] | None = None,
        kernel: str = "auto",
        guards: Guards | None = None,
        **params: Any,
    ) -> AttentionPlan:
        """Make a plan of one pattern for all layers, heads and noise levels, for any network and grid.

        Args:
            name: of the pattern.
            correction: its name; None is "pooled_tail", and for a dense plan "none".
            correction_params: of the correction.
            kernel: see `Choice`.
            guards: see `Guards`.
            **params: of the pattern.

        Raises:
            ValueError: an unknown name or parameter.
        """
        if correction is None:
            correction = "none" if name == "dense" else "pooled_tail"
        choice = Choice(name, params, correction, correction_params or {}, kernel)
        return cls((choice,), torch.zeros(1, 1, 1, dtype=torch.int16), guards=guards or Guards())

    @classmethod
    def of_entries(cls, entries: Sequence[PlanEntry], layers: int = 1, heads: int = 1, **fields: Any) -> AttentionPlan:
        """Make a plan of parts; what none of them names is dense.

        Args:
            entries: the parts, later ones over earlier ones.
            layers: of the network; 1 if no part names any.
            heads: likewise.
            **fields: of the class: `guards`, `grid`, `architecture`, `weights`, `tensors`.

        Raises:
            ValueError: a layer or head that isn't there.
        """
        levels = sorted({level for one in entries for level in _edges(one)}, reverse=True)
        table = torch.zeros(len(levels) + 1, layers, heads, dtype=torch.int16)
        choices = list(dict.fromkeys([DENSE, *(one.choice for one in entries)]))
        inside = [math.inf, *levels, -math.inf]  # bin b holds levels from inside[b] down to inside[b + 1]
        for one in entries:
            low, high = (-math.inf, math.inf) if one.sigma is None else one.sigma
            low, high = low if low > 0 else -math.inf, math.nextafter(high, math.inf)
            bins = [b for b in range(len(levels) + 1) if inside[b + 1] >= low and inside[b] <= high]
            rows = range(layers) if one.layers is None else one.layers
            columns = range(heads) if one.heads is None else one.heads
            if max(rows, default=0) >= layers or max(columns, default=0) >= heads:
                raise ValueError(f"a part names layer {max(rows)}, head {max(columns)}; there are {layers} and {heads}")
            index = torch.meshgrid(*(torch.tensor(list(axis)) for axis in (bins, rows, columns)), indexing="ij")
            table[index] = choices.index(one.choice)
        return cls(tuple(choices), table, tuple(levels), **fields).simplified()

    def simplified(self) -> AttentionPlan:
        """Return the same plan with axes of size 1 where a table doesn't differ along them, and only used choices."""
        table = self.table
        for axis in range(3):
            first = table.narrow(axis, 0, 1)
            if bool((table == first).all()):
                table = first
        used, table = torch.unique(table, return_inverse=True)
        bins = self.sigma_bins if table.shape[0] > 1 else ()
        choices = tuple(self.choices[index] for index in used.tolist())
        return replace(self, choices=choices, table=table.to(torch.int16), sigma_bins=bins)

    # ------------------------------------------------------------------------- asking

    @property
    def is_portable(self) -> bool:
        """Whether it fits any network and grid."""
        return self.grid is None and not self.architecture and self.table.shape[1] == self.table.shape[2] == 1

    @property
    def is_uniform(self) -> bool:
        """Whether it is one choice for everything."""
        return len(self.choices) == 1

    @property
    def needs_step(self) -> bool:
        """Whether the noise level or number of a step decides anything."""
        return self.guards.needs_step or self.table.shape[0] > 1

    @property
    def bins(self) -> int:
        """How many ranges of noise levels it tells apart."""
        return self.table.shape[0]

    def bin_of(self, sigma: float | None) -> int:
        """Return the bin of a noise level."""
        if self.table.shape[0] == 1 or sigma is None:
            return 0
        return sum(sigma < level for level in self.sigma_bins)

    def resolve(self, sigma: float | None, layer: int, heads: int) -> tuple[Group, ...]:
        """Return what a layer computes: heads that compute the same are one group.

        Args:
            sigma: noise level; None only for plans that don't ask for it.
            layer: its number among those that the plan is for.
            heads: how many it has.

        Raises:
            ValueError: the plan is for another number of layers or heads, or needs a noise level.
        """
        if sigma is None and self.table.shape[0] > 1:
            raise ValueError("the plan differs by noise level, and none is given")
        layers, columns = self.table.shape[1:]
        if columns not in (1, heads) or (layers != 1 and not 0 <= layer < layers):
            raise ValueError(f"the plan is for {layers} layers of {columns} heads, not for layer {layer} of {heads}")
        row = self.table[self.bin_of(sigma), layer if layers > 1 else 0].tolist()
        if len(set(row)) == 1:
            return (Group(self.choices[row[0]], None),)
        groups: dict[int, list[int]] = {}
        for head, number in enumerate(row):
            groups.setdefault(number, []).append(head)
        return tuple(Group(self.choices[number], tuple(members)) for number, members in groups.items())

    def params_of(self, choice: Choice) -> dict[str, Any]:
        """Return the parameters of a choice's pattern, its tensors looked up."""
        named = choice.params.items()
        return {name: self.tensors[one.tensor] if isinstance(one, TensorName) else one for name, one in named}

    def shares(self) -> dict[str, float]:
        """Return which fraction of the table each choice has."""
        counts = torch.bincount(self.table.flatten().long(), minlength=len(self.choices))
        return {str(one): int(count) / self.table.numel() for one, count in zip(self.choices, counts, strict=True)}

    # ----------------------------------------------------------------------- changing

    def regrid(self, grid: tuple[int, int, int] | None) -> AttentionPlan:
        """Return the plan for another grid: parameters stay, block maps are made anew when it computes.

        Args:
            grid: (frames, rows, columns); None is any.

        Raises:
            ArtifactError: the plan holds tensors (offline masks), which belong to one grid.
        """
        if self.tensors and grid != self.grid:
            raise ArtifactError(
                f"this plan holds {', '.join(list(self.tensors)[:3])} for the grid {self.grid}: masks of tensors "
                "belong to one grid. Calibrate it anew, or use it on that grid"
            )
        return replace(self, grid=grid)

    def for_model(self, model: nn.Module, grid: tuple[int, int, int] | None = None) -> AttentionPlan:
        """Return the plan bound to a network, and perhaps to a grid: it will refuse others.

        Args:
            model: the network.
            grid: (frames, rows, columns).
        """
        architecture, weights = model_fingerprint(model)
        return replace(self, architecture=architecture, weights=weights, grid=grid or self.grid)

    def check_layers(self, layers: int) -> None:
        """Refuse a network of another number of layers.

        Raises:
            ArtifactError: the plan differs by layer, and has another number of them.
        """
        if self.table.shape[1] not in (1, layers):
            raise ArtifactError(
                f"this plan is for {self.table.shape[1]} attention layers, the network has {layers}: calibrate one "
                "for it"
            )

    def check_model(self, model: nn.Module, any_weights: bool = False) -> None:
        """Refuse a network that the plan is not for.

        Args:
            model: the network, wrapped or not.
            any_weights: accept other weights of the same architecture.

        Raises:
            ArtifactError: it says what differs.
        """
        if not self.architecture:
            return
        architecture, weights = model_fingerprint(model)
        if architecture != self.architecture:
            raise ArtifactError("this plan was made for another architecture: calibrate one for this network")
        if self.weights and weights != self.weights and not any_weights:
            raise ArtifactError(
                "this plan was made for other weights of this architecture: calibrate anew, or accept it with "
                "any_weights=True"
            )

    # ------------------------------------------------------------------------- files

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan, run-length coded, into a file that ends in .safetensors."""
        header = ArtifactHeader(
            plan_file.KIND, self.architecture, self.weights, "", self.grid or (0, 0, 0), self.sigma_bins
        )
        plan_file.write(path, header, self.choices, self.guards, self.table, self.tensors, TensorName)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> AttentionPlan:
        """Read a plan.

        Raises:
            ArtifactError: the file is no plan, or was damaged.
            FileNotFoundError: there is no such file.
        """
        header, choices, guards, table, tensors = plan_file.read(path)
        try:
            return cls(
                tuple(Choice(**_with_names(one)) for one in choices),
                table,
                header.sigma_bins,
                Guards(**guards),
                header.grid if min(header.grid) > 0 else None,
                header.architecture,
                header.weights,
                tensors,
            )
        except (TypeError, ValueError, KeyError) as error:
            raise ArtifactError(f"{path} is no plan that this version can use: {error}") from error

    # ---------------------------------------------------------------------- attaching

    def attach(self, target: Any, *, any_weights: bool = False, measure_error: int = 0) -> Attachment:
        """Have the attention layers of a network or pipeline follow the plan.

        Args:
            target: a transformer, wrapped or not, or a pipeline.
            any_weights: accept other weights of the architecture that the plan was made for.
            measure_error: queries of each sparse call that are compared with dense attention; 0 measures nothing.

        Returns:
            The attachment; `report()` says what was computed, `detach()` takes the plan off. A pipeline whose steps
            nobody tracks wants a `sampling.step_tracker` too; `AccelerationConfig(attention=...)` brings one.

        Raises:
            AttachError: nothing to attach to.
            ArtifactError: the plan is for another network.
        """
        return PlannedAttention(self, any_weights=any_weights, measure_error=measure_error).attach(target)

    def keeps_state(self) -> bool:
        """Return whether a correction keeps tensors between steps."""
        return any(correction_type(one.correction).keeps_state for one in self.choices)


def _with_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a choice, with the names of tensors as such."""
    params = {
        name: TensorName(value["tensor"]) if isinstance(value, dict) else value
        for name, value in fields["params"].items()
    }
    return {**fields, "params": params}


def _edges(entry: PlanEntry) -> tuple[float, ...]:
    """Return the noise levels at which a part begins or ends: a level belongs to the bin of higher noise."""
    if entry.sigma is None:
        return ()
    low, high = entry.sigma
    return tuple(level for level in (low, math.nextafter(high, math.inf)) if 0 < level < math.inf)
