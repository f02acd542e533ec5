"""Find the `StepContext` of each network call, for any pipeline of diffusers or ours.

Three sources, the best first: the context that the loop sets itself; the step that the pipeline passes to
`cache_context`; the network's `timestep`, looked up in the scheduler's table with the step index that the scheduler
keeps. Calls are never counted across steps: a step that makes fewer calls shifts nothing. Where no source answers, the
call has no step context and the reason is counted.
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

from dit.runtime.families import Family, TimestepScale, call_family_of
from dit.runtime.hooks import AttachError, Attachment, Mechanism, attachments
from dit.runtime.stages import Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, current_step, next_run, step_scope
from sampling.sigma_schedule import SigmaSchedule, scheduler_of

ROUNDING_TOLERANCE = 2.0**-7
"""How far a timestep may lie from its entry, as a fraction of the largest: two roundings to bfloat16."""

COMMON_SCALES = (
    TimestepScale(),
    TimestepScale(factor=0.001),
    TimestepScale(factor=-0.001, offset=1.0),
    TimestepScale(factor=-1.0, offset=1000.0),
)
"""Scales of the timesteps that networks receive; tried where a network has no row in the table of families."""

SIGMA: Literal["sigma"] = "sigma"
NOISE_FRACTION: Literal["noise fraction"] = "noise fraction"
"""Networks may also receive sigma itself or sigma / (1 + sigma), whatever the scheduler's timesteps."""

Scale = TimestepScale | Literal["sigma", "noise fraction"]

BATCHED = "cond_uncond"
"""The name that pipelines of diffusers give to a call on both branches (also when guidance is off)."""


class StepTracker(Mechanism):
    """Set the step context of every network call of a pipeline.

    One tracker serves one pipeline. It is the lowest of all mechanisms, so that the others can read the context.

    Example:
        >>> with CoordinateResolver().attach(pipe) as attachment:
        ...     pipe("a red apple")
        >>> attachment.report()["found"]  # {"scheduler": 28}
    """

    name = "step_tracker"
    stage = Stage.STEP_CONTEXT

    is_automatic = False
    """Whether it was attached by a mechanism that needs the step context, and not by the user."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._pipeline: Any = None
        self._run = _Run()
        self._context: tuple[str | None, dict[str, Any]] = (None, {})
        self._scopes: list[AbstractContextManager] = []

    def install(self, attachment: Attachment) -> None:
        """Set hooks on the calls of the pipeline's networks, and wrap their `cache_context`."""
        pipeline = attachment.target
        if scheduler_of(pipeline) is None:
            raise AttachError(
                f"steps are tracked in a pipeline with a scheduler, got {type(pipeline).__name__}; for a bare "
                "network set them with dit.runtime.step_scope"
            )
        if self._pipeline is not None and self._pipeline is not pipeline:
            raise AttachError("this CoordinateResolver serves another pipeline; make one for each")
        self._pipeline = pipeline
        enter, leave = torch.compiler.disable(self._enter), torch.compiler.disable(self._leave)
        for model in attachment.models.values():
            bare = unwrap(model)
            family = call_family_of(bare)
            attachment.pre_hook(model, partial(enter, attachment, family))
            attachment.post_hook(model, leave, always=True)
            if hasattr(bare, "cache_context"):
                attachment.replace(bare, "cache_context", partial(self._record_cache_context, bare.cache_context))

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return how many calls each source resolved, and how many runs there were."""
        return {"found": dict(self.found), "runs": self._run.count}

    # ------------------------------------------------------------------------ hooks

    @contextmanager
    def _record_cache_context(self, cache_context: Any, name: str, **fields: Any) -> Iterator[None]:
        """Record what a pipeline passes to the caches of diffusers."""
        outer, self._context = self._context, (name, fields)
        try:
            with cache_context(name, **fields):
                yield
        finally:
            self._context = outer

    def _enter(self, attachment: Attachment, family: Family, model: nn.Module, args: tuple, kwargs: dict) -> None:
        context = current_step()
        if context is None:
            try:
                context, source = self._resolve(family, model, args, kwargs)
            except _StepNotFound as reason:
                source = None
                attachment.skip(str(reason))
        else:
            source = "loop"
        if source is not None:
            self.found[source] += 1
        scope = step_scope(context)
        scope.__enter__()
        self._scopes.append(scope)

    def _leave(self, *_: Any) -> None:
        if self._scopes:
            self._scopes.pop().__exit__(None, None, None)

    # -------------------------------------------------------------------- resolving

    def _resolve(self, family: Family, model: nn.Module, args: tuple, kwargs: dict) -> tuple[StepContext, str]:
        run = self._run
        run.read(scheduler_of(self._pipeline))
        inputs = family.bind(model, args, kwargs)
        name, fields = self._context
        # 1. step index: from cache_context, else by looking up the timestep
        index, is_exact = fields.get("step_index"), True
        source = "scheduler" if index is None else "cache_context"
        if index is None:
            index, is_exact = self._find(family, model, inputs)
            index -= run.first(index)
        # 2. branch: named by cache_context, else from the family's layout
        branch, order = self._branch(name, family, inputs)
        branch = run.enter(index, branch, order)
        # 3. number of steps and sigma: what is left of the table from the run's first entry
        table = run.table.last(fields.get("num_inference_steps") or len(run.table) - run.offset)
        here = table.at(run.number, index, branch, is_exact)
        return (here if fields.get("sigma") is None else replace(here, sigma=float(fields["sigma"]))), source

    def _find(self, family: Family, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, bool]:
        """Return the index of a call in the scheduler's table, and whether it is certain."""
        table, hint = self._run.table, _hint(scheduler_of(self._pipeline))
        received = family.received_timestep(inputs)
        if received is None:
            raise _StepNotFound(f"the call has no {family.timestep_argument}")
        # a network with a known timestep scale: one look-up
        timestep = family.scheduler_timestep(model, inputs, self._pipeline)
        if timestep is not None:
            return find_entry(table, timestep, hint, must_check=self._run.is_fresh)
        # an unknown network: try the common scales, keep those that fit
        tensor = torch.as_tensor(received)
        values: dict[Scale, Tensor] = {
            scale: tensor.float().max() if isinstance(scale, str) else scale.scheduler_timestep(tensor).max()
            for scale in self._run.scales
        }
        index, self._run.scales = find_unlisted(table, values, self._expected(hint), self._run.left(tensor))
        return index, False

    def _expected(self, hint: int | None) -> int | None:
        """Return the index that the scheduler must be at: a run begins at its first entry.

        After that a scheduler without step index may be one of which the pipeline steps copies, as for clips whose
        frames have timesteps of their own.
        """
        return 0 if hint is None and self._run.is_fresh else hint

    def _branch(self, name: str | None, family: Family, inputs: Mapping[str, Any]) -> tuple[str | None, tuple]:
        """Return the branch of a call; None and the branch order if only the index among the step's calls decides."""
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
        """Return whether both halves of the batch are the same images; checked once a run and batch size."""
        latents = family.latents(inputs)  # (B, ...)
        size = len(latents)
        if size not in self._run.doubled:
            self._run.doubled[size] = size % 2 == 0 and torch.equal(latents[: size // 2], latents[size // 2 :])
        return self._run.doubled[size]


def track_steps(pipeline: Any) -> Attachment | None:
    """Attach a `StepTracker` unless the pipeline has one.

    Args:
        pipeline: of diffusers or ours.

    Returns:
        The new attachment; None where there was one already, which stays.
    """
    if any(isinstance(other.mechanism, StepTracker) for other in attachments(pipeline)):
        return None
    return StepTracker().attach(pipeline)


class TrackedAttachment(Attachment):
    """An attachment that adds a step tracker to its pipeline where there is none; the last of them detaches it."""

    def __init__(self, mechanism: Mechanism, target: Any) -> None:
        tracker = track_steps(target) if scheduler_of(target) is not None else None
        if tracker is not None:
            tracker.mechanism.is_automatic = True  # pyright: ignore[reportAttributeAccessIssue]
        try:
            super().__init__(mechanism, target)
        except BaseException:
            if tracker is not None:
                tracker.detach()
            raise

    def detach(self) -> None:
        """Detach, and detach the automatic step tracker with the last mechanism that needed it."""
        super().detach()
        left = attachments(self.target)
        if len(left) == 1 and isinstance(left[0].mechanism, StepTracker) and left[0].mechanism.is_automatic:
            left[0].detach()


class _StepNotFound(Exception):
    """The step of a call cannot be found; the text is the reason that is counted."""


class _Run:
    """State of the current run; a new one begins when the scheduler gets new timesteps or the steps go back.

    Attributes:
        number: of the run, see `next_run`.
        count: runs so far.
        table: noise levels of the scheduler.
        offset: entry of the table that the run began with.
        is_fresh: no call of the run was resolved yet.
        doubled: for each batch size seen, whether it held both branches.
        scales: of timesteps, as far as the calls fit them; for networks without a row.
    """

    def __init__(self) -> None:
        self.number, self.count = 0, 0
        self.table = SigmaSchedule((), ())
        self._timesteps: Any = None
        self._restart()

    def _restart(self) -> None:
        self.offset, self._step, self.is_fresh = 0, -1, True
        self._branches: list[str] = []
        self.doubled: dict[int, bool] = {}
        self._received: Tensor | None = None
        self.scales: tuple[Scale, ...] = (*COMMON_SCALES, SIGMA, NOISE_FRACTION)

    def read(self, scheduler: Any) -> None:
        """Read the scheduler's timesteps if they were set anew since the last call."""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            raise _StepNotFound("the scheduler has no timesteps")
        if timesteps is not self._timesteps:  # set_timesteps makes a new tensor; this reference keeps the old one alive
            self._timesteps, self.table = timesteps, SigmaSchedule.of(scheduler)
            self._restart()

    def first(self, entry: int) -> int:
        """Return the entry that the run began with, given the one it is at; runs may skip the first ones."""
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
        """Record a call and return its branch.

        Args:
            step: of the call.
            branch: None if only the index among the calls of the step decides.
            order: branches in the order of such calls.
        """
        continues = not self.is_fresh and step == self._step
        index = len(self._branches) if continues else 0
        if branch is None:
            branch = order[index] if index < len(order) else order[0] if order else f"call_{index}"
        # A step that goes back, or a branch that comes twice within a step, begins a new run.
        if self.is_fresh or step < self._step or (continues and branch in self._branches):
            self.number, self.count, continues = next_run(), self.count + 1, False
            self.is_fresh = False
        self._step = step
        self._branches = [*self._branches, branch] if continues else [branch]
        return branch


def find_entry(
    table: SigmaSchedule, timestep: Tensor, hint: int | None = None, must_check: bool = True
) -> tuple[int, bool]:
    """Find a timestep in a table.

    Args:
        table: of the scheduler.
        timestep: of the call, (), in the scheduler's unit; perhaps rounded.
        hint: the entry that the scheduler itself is at, if it keeps count; needed where the table repeats timesteps.
        must_check: whether to compare the hint with a timestep on another device, which synchronizes with it.

    Returns:
        The index, and whether it is certain.
    """
    if hint is not None and hint < len(table) and not must_check and timestep.device.type != "cpu":
        return hint, True
    value, largest = float(timestep), max(map(abs, table.timesteps))
    if hint is not None and hint < len(table) and abs(table.timesteps[hint] - value) <= ROUNDING_TOLERANCE * largest:
        return hint, True
    distances = [abs(entry - value) for entry in table.timesteps]
    nearest = min(range(len(table)), key=distances.__getitem__)
    if distances[nearest] > ROUNDING_TOLERANCE * largest:
        raise _StepNotFound("the timestep is not in the scheduler's table")
    others = distances[:nearest] + distances[nearest + 1 :]
    if others and min(others) <= 2 * distances[nearest] + 1e-9:
        raise _StepNotFound("the timestep occurs several times in the scheduler's table")
    return nearest, distances[nearest] <= 1e-6 * largest


def find_unlisted(
    table: SigmaSchedule, values: Mapping[Scale, Tensor], expected: int | None, left: int | None = None
) -> tuple[int, tuple[Scale, ...]]:
    """Find the entry of a call whose timestep scale is not known.

    Args:
        table: of the scheduler.
        values: the call's timestep in the scheduler's unit by each scale that it may have; by `SIGMA` its noise level,
            by `NOISE_FRACTION` sigma / (1 + sigma).
        expected: the entry that the scheduler is at, if it keeps count.
        left: the entry that the run leaves with this call. Where some tokens are clean, their timesteps on an
            inverted scale match the first entry at every step; only the right scale moves on to the next entry.

    Returns:
        The index, and the scales that fit it.
    """
    found: dict[Scale, int] = {}
    for scale, value in values.items():
        try:
            found[scale] = find_entry(_table_of(scale, table), value, expected)[0]
        except _StepNotFound:
            continue
    if expected is not None:
        found = {scale: index for scale, index in found.items() if index == expected}
    if left is not None and len(set(found.values())) > 1:
        found = {scale: index for scale, index in found.items() if index == left + 1}
    if len(set(found.values())) != 1:
        raise _StepNotFound("the network's scale of timesteps is not known")
    return next(iter(found.values())), tuple(found)


def _table_of(scale: Scale, table: SigmaSchedule) -> SigmaSchedule:
    """Return the table in the unit of a scale."""
    return (
        {SIGMA: table.by_sigma, NOISE_FRACTION: table.by_noise_fraction}[scale]() if isinstance(scale, str) else table
    )


def _hint(scheduler: Any) -> int | None:
    """Return the entry that the scheduler is at, if it keeps count."""
    index = getattr(scheduler, "step_index", None)
    return getattr(scheduler, "begin_index", None) if index is None else index
