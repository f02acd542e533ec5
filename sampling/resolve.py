"""Finds the `Coordinates` of each call of a network, for any pipeline of diffusers or ours.

Three sources, the best first: coordinates that the loop says itself; the step that the pipeline passes to
`cache_context`; the network's `timestep`, looked up in the scheduler's table with the step index that the scheduler
keeps. Nothing is found by counting calls across steps: a step that makes fewer calls shifts nothing. Where none of
the three answers, the call has no coordinates and the reason is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit.runtime.attachment import AttachError, Attachment, Mechanism, attachments
from dit.runtime.coordinates import Coordinates, coordinates_scope, current_coordinates, next_run
from dit.runtime.families import Family, TimestepScale, call_family_of
from dit.runtime.stages import Stage
from dit.runtime.state import unwrap
from sampling.noise_table import NoiseTable, scheduler_of

ROUNDING = 2.0**-7
"""How far a timestep may lie from its entry, as a share of the largest: two roundings to bfloat16."""

USUAL_SCALES = (
    TimestepScale(),
    TimestepScale(factor=0.001),
    TimestepScale(factor=-0.001, offset=1.0),
    TimestepScale(factor=-1.0, offset=1000.0),
)
"""What networks may receive for a timestep; tried where a network has no row in the table of families."""

LEVEL: Literal["noise level"] = "noise level"
SHARE: Literal["share of noise"] = "share of noise"
"""They may also receive the noise level itself or the noise's share of the sum, whatever the scheduler's timesteps."""

Scale = TimestepScale | Literal["noise level", "share of noise"]

BATCHED = "cond_uncond"
"""The name that pipelines of diffusers give to a call on both branches (also when guidance is off)."""


class CoordinateResolver(Mechanism):
    """Says the coordinates of every call that a pipeline makes of its networks.

    One resolver serves one pipeline. It is the lowest of all mechanisms, so that the others find coordinates.

    Example:
        >>> with CoordinateResolver().attach(pipe) as attachment:
        ...     pipe("a red apple")
        >>> attachment.report()["found"]  # {"scheduler": 28}
    """

    name = "coordinates"
    stage = Stage.COORDINATES

    is_brought = False
    """Whether a mechanism that needs coordinates attached it, and not the user."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._pipeline: Any = None
        self._run = _Run()
        self._context: tuple[str | None, dict[str, Any]] = (None, {})
        self._scopes: list[AbstractContextManager] = []

    def install(self, attachment: Attachment) -> None:
        """Listen to the calls of the pipeline's networks, and to their `cache_context`."""
        pipeline = attachment.target
        if scheduler_of(pipeline) is None:
            raise AttachError(
                f"coordinates are found in a pipeline with a scheduler, got {type(pipeline).__name__}; for a bare "
                "network say them with dit.runtime.coordinates_scope"
            )
        if self._pipeline is not None and self._pipeline is not pipeline:
            raise AttachError("this CoordinateResolver serves another pipeline; make one for each")
        self._pipeline = pipeline
        enter, leave = torch.compiler.disable(self._enter), torch.compiler.disable(self._leave)
        for model in attachment.models.values():
            bare = unwrap(model)
            family = call_family_of(bare)
            attachment.before(model, partial(enter, attachment, family))
            attachment.after(model, leave, always=True)
            if hasattr(bare, "cache_context"):
                attachment.replace(bare, "cache_context", partial(self._listen, bare.cache_context))

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return by which source calls were placed, how often, and how many runs there were."""
        return {"found": dict(self.found), "runs": self._run.count}

    # -------------------------------------------------------------------- listening

    @contextmanager
    def _listen(self, cache_context: Any, name: str, **fields: Any) -> Iterator[None]:
        """Hear what a pipeline tells the caches of diffusers."""
        outer, self._context = self._context, (name, fields)
        try:
            with cache_context(name, **fields):
                yield
        finally:
            self._context = outer

    def _enter(self, attachment: Attachment, family: Family, model: nn.Module, args: tuple, kwargs: dict) -> None:
        said = current_coordinates()
        if said is None:
            try:
                said, source = self._resolve(family, model, args, kwargs)
            except _Unknown as unknown:
                source = None
                attachment.skip(str(unknown))
        else:
            source = "loop"
        if source is not None:
            self.found[source] += 1
        scope = coordinates_scope(said)
        scope.__enter__()
        self._scopes.append(scope)

    def _leave(self, *_: Any) -> None:
        if self._scopes:
            self._scopes.pop().__exit__(None, None, None)

    # -------------------------------------------------------------------- resolving

    def _resolve(self, family: Family, model: nn.Module, args: tuple, kwargs: dict) -> tuple[Coordinates, str]:
        run = self._run
        run.read(scheduler_of(self._pipeline))
        inputs = family.bind(model, args, kwargs)
        name, fields = self._context
        index, is_exact = fields.get("step_index"), True
        source = "scheduler" if index is None else "cache_context"
        if index is None:
            index, is_exact = self._find(family, model, inputs)
            index -= run.first(index)
        branch, order = self._branch(name, family, inputs)
        branch = run.enter(index, branch, order)
        table = run.table.last(fields.get("num_inference_steps") or len(run.table) - run.offset)
        here = table.at(run.number, index, branch, is_exact)
        return (here if fields.get("sigma") is None else replace(here, sigma=float(fields["sigma"]))), source

    def _find(self, family: Family, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, bool]:
        """The entry of the scheduler's table that a call stands at, and whether that is beyond doubt."""
        table, hint = self._run.table, _hint(scheduler_of(self._pipeline))
        received = family.received_timestep(inputs)
        if received is None:
            raise _Unknown(f"the call has no {family.timestep_argument}")
        timestep = family.scheduler_timestep(model, inputs, self._pipeline)
        if timestep is not None:
            return find_entry(table, timestep, hint, must_check=self._run.is_fresh)
        tensor = torch.as_tensor(received)
        values: dict[Scale, Tensor] = {
            scale: tensor.float().max() if isinstance(scale, str) else scale.scheduler_timestep(tensor).max()
            for scale in self._run.scales
        }
        index, self._run.scales = find_unlisted(table, values, self._expected(hint), self._run.left(tensor))
        return index, False

    def _expected(self, hint: int | None) -> int | None:
        """Where the scheduler must be: a run begins at its first entry.

        Behind that a scheduler that says nothing may be one of which the pipeline steps copies, as for clips whose
        frames have timesteps of their own.
        """
        return 0 if hint is None and self._run.is_fresh else hint

    def _branch(self, name: str | None, family: Family, inputs: Mapping[str, Any]) -> tuple[str | None, tuple]:
        """The branch of a call; None with the branches in order where only its place among the step's calls tells."""
        if name is not None and name != BATCHED:
            return name, ()
        layout = family.branches(self._pipeline) or family.branches()
        if not getattr(self._pipeline, "do_classifier_free_guidance", True):
            return "cond", ()
        if name is None and layout is not None and layout.kind != "batched":
            return (None, layout.order) if layout.kind == "two_calls" else ("cond", ())
        if family.latent_argument in inputs and self._is_doubled(family, inputs):
            return "all", ()
        return ("cond", ()) if layout is not None or name == BATCHED else (None, ())

    def _is_doubled(self, family: Family, inputs: Mapping[str, Any]) -> bool:
        """Whether both halves of the batch are the same images; looked at once a run and batch size."""
        latents = family.latents(inputs)  # (B, ...)
        size = len(latents)
        if size not in self._run.doubled:
            self._run.doubled[size] = size % 2 == 0 and torch.equal(latents[: size // 2], latents[size // 2 :])
        return self._run.doubled[size]


def resolve_coordinates(pipeline: Any) -> Attachment | None:
    """Attach a `CoordinateResolver` unless the pipeline has one.

    Args:
        pipeline: of diffusers or ours.

    Returns:
        The new attachment; None where there was one already, which stays.
    """
    if any(isinstance(other.mechanism, CoordinateResolver) for other in attachments(pipeline)):
        return None
    return CoordinateResolver().attach(pipeline)


class PlacedAttachment(Attachment):
    """An attachment that brings a resolver to its pipeline where there is none; the last of them takes it away."""

    def __init__(self, mechanism: Mechanism, target: Any) -> None:
        brought = resolve_coordinates(target) if scheduler_of(target) is not None else None
        if brought is not None:
            brought.mechanism.is_brought = True  # pyright: ignore[reportAttributeAccessIssue]
        try:
            super().__init__(mechanism, target)
        except BaseException:
            if brought is not None:
                brought.detach()
            raise

    def detach(self) -> None:
        """See `Attachment.detach`."""
        super().detach()
        left = attachments(self.target)
        if len(left) == 1 and isinstance(left[0].mechanism, CoordinateResolver) and left[0].mechanism.is_brought:
            left[0].detach()


class _Unknown(Exception):
    """A call cannot be placed; the text is the reason that is counted."""


class _Run:
    """Which run this is: a new one when the scheduler got new timesteps or the steps go back.

    Attributes:
        number: of the run, see `next_run`.
        count: runs so far.
        table: noise levels of the scheduler.
        offset: entry of the table that the run began with.
        is_fresh: no call of the run was placed yet.
        doubled: for each batch size seen, whether it held both branches.
        scales: of timesteps, as far as the calls fit them; for networks without a row.
    """

    def __init__(self) -> None:
        self.number, self.count = 0, 0
        self.table = NoiseTable((), ())
        self._timesteps: Any = None
        self._restart()

    def _restart(self) -> None:
        self.offset, self._step, self.is_fresh = 0, -1, True
        self._branches: list[str] = []
        self.doubled: dict[int, bool] = {}
        self._received: Tensor | None = None
        self.scales: tuple[Scale, ...] = (*USUAL_SCALES, LEVEL, SHARE)

    def read(self, scheduler: Any) -> None:
        """Take over the scheduler's table if it was set anew since the last call."""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            raise _Unknown("the scheduler has no timesteps")
        if timesteps is not self._timesteps:  # set_timesteps makes a new tensor; this reference keeps the old one alive
            self._timesteps, self.table = timesteps, NoiseTable.of(scheduler)
            self._restart()

    def first(self, entry: int) -> int:
        """The entry that the run began with, given the one it is at; runs may skip the first ones."""
        if self.is_fresh or entry < self.offset:
            self.offset = entry
        return self.offset

    def left(self, received: Tensor) -> int | None:
        """Return the entry that the run leaves with a call: the one it was at, if the call's timestep is another.

        Args:
            received: timestep of the call as the network receives it.
        """
        before, self._received = self._received, received.detach().clone()
        is_other = before is not None and (before.shape != received.shape or not torch.equal(before, received))
        return self.offset + self._step if is_other and not self.is_fresh else None

    def enter(self, step: int, branch: str | None, order: tuple[str, ...]) -> str:
        """Note a call and name its branch.

        Args:
            step: of the call.
            branch: None if only the place among the calls of the step tells.
            order: branches in the order of such calls.
        """
        goes_on = not self.is_fresh and step == self._step
        place = len(self._branches) if goes_on else 0
        if branch is None:
            branch = order[place] if place < len(order) else order[0] if order else f"call_{place}"
        if self.is_fresh or step < self._step or (goes_on and branch in self._branches):
            self.number, self.count, goes_on = next_run(), self.count + 1, False
            self.is_fresh = False
        self._step = step
        self._branches = [*self._branches, branch] if goes_on else [branch]
        return branch


def find_entry(
    table: NoiseTable, timestep: Tensor, hint: int | None = None, must_check: bool = True
) -> tuple[int, bool]:
    """Find a timestep in a table.

    Args:
        table: of the scheduler.
        timestep: of the call, (), in the scheduler's unit; perhaps rounded.
        hint: the entry that the scheduler itself is at, if it says; needed where the table repeats timesteps.
        must_check: whether to compare the hint with a timestep on another device, which means to wait for it.

    Returns:
        The index, and whether it is beyond doubt.
    """
    if hint is not None and hint < len(table) and not must_check and timestep.device.type != "cpu":
        return hint, True
    value, largest = float(timestep), max(map(abs, table.timesteps))
    if hint is not None and hint < len(table) and abs(table.timesteps[hint] - value) <= ROUNDING * largest:
        return hint, True
    distances = [abs(entry - value) for entry in table.timesteps]
    nearest = min(range(len(table)), key=distances.__getitem__)
    if distances[nearest] > ROUNDING * largest:
        raise _Unknown("the timestep is not in the scheduler's table")
    others = distances[:nearest] + distances[nearest + 1 :]
    if others and min(others) <= 2 * distances[nearest] + 1e-9:
        raise _Unknown("the timestep stands several times in the scheduler's table")
    return nearest, distances[nearest] <= 1e-6 * largest


def find_unlisted(
    table: NoiseTable, values: Mapping[Scale, Tensor], expected: int | None, left: int | None = None
) -> tuple[int, tuple[Scale, ...]]:
    """Find the entry of a call whose scale of timesteps is not known.

    Args:
        table: of the scheduler.
        values: the call's timestep in the scheduler's unit by each scale that it may have; by `LEVEL` its noise level,
            by `SHARE` the noise's share.
        expected: the entry that the scheduler is at, if it says.
        left: the entry that the run leaves with this call. Where some tokens are clean, their timesteps read the wrong
            way round are the first of the table at every step; only the right scale goes on to the next entry.

    Returns:
        The index, and the scales that fit it.
    """
    found: dict[Scale, int] = {}
    for scale, value in values.items():
        try:
            found[scale] = find_entry(_table_of(scale, table), value, expected)[0]
        except _Unknown:
            continue
    if expected is not None:
        found = {scale: index for scale, index in found.items() if index == expected}
    if left is not None and len(set(found.values())) > 1:
        found = {scale: index for scale, index in found.items() if index == left + 1}
    if len(set(found.values())) != 1:
        raise _Unknown("the network's scale of timesteps is not known")
    return next(iter(found.values())), tuple(found)


def _table_of(scale: Scale, table: NoiseTable) -> NoiseTable:
    """The table in the unit of a scale."""
    return {LEVEL: table.by_level, SHARE: table.by_share}[scale]() if isinstance(scale, str) else table


def _hint(scheduler: Any) -> int | None:
    """The entry that the scheduler is at, if it keeps count."""
    index = getattr(scheduler, "step_index", None)
    return getattr(scheduler, "begin_index", None) if index is None else index
