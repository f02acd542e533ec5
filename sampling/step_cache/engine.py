"""StepCache: compute some steps, forecast the others. A gate (skip policy), a forecaster and a region.

The cache knows the step from `StepContext`, never from counting calls, and keeps what it needs by network and branch
until the run ends. A call whose step is unknown or can't be forecast is computed, and the reason is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dit.runtime import diffusers_compat
from dit.runtime.families import call_family_of
from dit.runtime.hooks import AttachError, Attachment, Mechanism, attachments
from dit.runtime.stages import Resource, Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, current_step
from sampling.sigma_schedule import SigmaSchedule, scheduler_of
from sampling.step_cache.call import LEAD, BranchState, Call
from sampling.step_cache.constants import data
from sampling.step_cache.forecasters import Anchor, Forecaster, Newton
from sampling.step_cache.gates import Gate, Interval
from sampling.step_cache.reasons import FAILURES, Reason
from sampling.step_cache.regions import InstalledRegion, Output, Region
from sampling.step_cache.values import Values, as_one, flatten, signature
from sampling.step_tracker import StepTracker, TrackedAttachment

PRESETS: dict[str, Callable[..., StepCache]] = {}
"""Name -> the function that makes it, which takes all its parameters; filled by `sampling.step_cache.presets`."""


def preset(make: Callable[..., StepCache]) -> Callable[..., StepCache]:
    """Register a function that makes a preset, under its own name; a decorator."""
    PRESETS[make.__name__] = make
    return make


NO_STEP_CONTEXT, GRADIENTS = Reason("no_step_context"), Reason("gradients")
"""Reasons to run the network without asking the gate."""
SHAPES_CHANGED = Reason("shapes_changed")


class StepCache(Mechanism):
    """Compute some steps and forecast the others.

    Args:
        gate: which steps are computed; None is every second one.
        forecaster: how the others are forecast; None is a line in sigma through the two newest computed steps.
        region: of which part of the network; None is its output, so that a forecast step costs nothing.
        warmup: steps at the beginning that are computed: a number, or below 1 a fraction of the steps.
        tail: steps at the end that are computed.
        max_skips: forecasts in a row; None is no limit.
        group: process group whose ranks decide alike, for gates that look at tensors; context parallelism is found.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> with StepCache.preset("budget", budget=0.35, profile=profile).attach(pipe) as cache:
        ...     pipe("a red apple", num_inference_steps=28)
        >>> cache.report()["strip"]  # {"all": "CC.C...C...C"}
    """

    name = "step_cache"
    stage = Stage.CACHE
    exclusive = frozenset({Resource.STEP})

    def __init__(
        self,
        gate: Gate | None = None,
        forecaster: Forecaster | None = None,
        region: Region | None = None,
        *,
        warmup: float = 0,
        tail: int = 0,
        max_skips: int | None = None,
        group: Any = None,
    ) -> None:
        if warmup < 0 or tail < 0 or (max_skips is not None and max_skips < 0):
            raise ValueError(f"warmup, tail and max_skips must not be negative, got {warmup}, {tail}, {max_skips}")
        self.gate = Interval() if gate is None else gate
        self.forecaster = Newton() if forecaster is None else forecaster
        self.region = Output() if region is None else region
        self.warmup, self.tail, self.max_skips, self.group = warmup, tail, max_skips, group
        self.on_decision: Callable[[StepContext, bool], None] | None = None
        self._attachment: Attachment | None = None
        self._reset(None)

    @staticmethod
    def preset(name: str, **params: Any) -> StepCache:
        """Make a published method, or a budgeted schedule.

        Args:
            name: one of `sampling.step_cache.PRESETS`, e.g. "budget", "fbcache", "taylorseer".
            **params: of the method, see `sampling.step_cache.presets`.

        Raises:
            ValueError: an unknown name or parameter.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no step cache {name!r}; use one of {', '.join(PRESETS)}")
        known = data("defaults")[name]
        unknown = set(params) - set(known)
        if unknown:
            raise ValueError(
                f"step cache {name!r} has no parameter {', '.join(sorted(unknown))}; it takes {', '.join(known)}"
            )
        return PRESETS[name](**{**known, **params})

    def attach(self, target: Any) -> Attachment:
        """Attach to a network or pipeline; where the pipeline has a scheduler, its steps are found too.

        Raises:
            AttachError: another cache is on the network, or the region is not in it.
        """
        return TrackedAttachment(self, target)

    def install(self, attachment: Attachment) -> None:
        """Wrap the networks, and the parts of them that the region names."""
        if self._attachment not in (None, attachment) and self._attachment.is_attached:  # pyright: ignore
            raise AttachError("this StepCache is attached elsewhere; make one for each network or pipeline")
        foreign = diffusers_compat.other_caches(attachment.target, attachment.models.values())
        if foreign:
            raise AttachError(
                f"{', '.join(foreign)} already caches steps of this network; two caches would skip steps that the "
                "other needs. Disable it first (disable_cache(), or cache_dit.disable_cache)"
            )
        self._attachment = attachment
        for component, model in attachment.models.items():
            bare = unwrap(model)
            self.gate.check(bare)
            if hasattr(bare, "enable_cache"):
                attachment.replace(bare, "enable_cache", _refuse)
            installed = self.region.install(self, attachment, component, model)
            attachment.wrap_forward(model, _outside_graph(partial(self._call, attachment, component, installed, bare)))

    # ---------------------------------------------------------------------- calls

    def _call(
        self,
        attachment: Attachment,
        component: str,
        installed: InstalledRegion,
        model: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        here = current_step()
        reason = NO_STEP_CONTEXT if here is None else GRADIENTS if torch.is_grad_enabled() else None
        if here is None or reason is not None:
            attachment.skip(str(reason))
            return forward(*args, **kwargs)
        parts = _parts_of(attachment.target, model, here, args, kwargs)
        state = self._branch_state(attachment, component, here, parts, args, kwargs)
        call = Call(self, attachment, component, here, state, parts)
        if self.gate.signal == "input" or self.region.needs_latents:
            family = call_family_of(model)
            call.signal = family.latents(family.bind(model, args, kwargs))
        if self.gate.signal in ("none", "input"):
            call.decide(call.signal)
        # compute or forecast
        output = installed.run(call, forward, args, kwargs)
        self._close(call, output)
        return output

    def _branch_state(
        self,
        attachment: Attachment,
        component: str,
        here: StepContext,
        parts: tuple[str, ...],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> BranchState:
        """Return the state of a branch; a new one at the first call of a run, or if the inputs changed their shape."""
        if here.run != self._run:
            self._reset(here.run)
            self._sigmas = _noise_levels(attachment.target, here)
        key, shapes = (component, LEAD if len(parts) > 1 else here.branch), signature((args, kwargs))
        state = self._states.get(key)
        if state is not None and state.shapes.setdefault(here.branch, shapes) != shapes:
            attachment.skip(str(SHAPES_CHANGED))
            state = None
        if state is None:
            state = self._states[key] = BranchState(shapes={here.branch: shapes}, last_step=here.step - 1)
            state.memory["sigmas"] = self._sigmas
        return state

    def keep(self, call: Call, slot: str, output: Any, values: Values, base: Values | None) -> None:
        """Keep what a computed step gave, for forecasts.

        Args:
            call: which step of which branch.
            slot: which part of the region.
            output: of that part.
            values: what is forecast: the tensors of the output, less the base where there is one.
            base: what the output is compared with.
        """
        call.push(slot, values)

    def decide(self, call: Call) -> bool:
        """Decide about a call: the rules, then the earlier branch of the step, then the gate."""
        here = call.here
        reason = self._rule(call)
        if reason is None:
            reason = self._why_not_forecast(call)
            if reason is not None:
                call.attachment.skip(str(reason))
        if reason is not None:
            self._computed[reason] += 1
        if self.gate.shared:
            self._decisions.setdefault(here.step, reason)
        return reason is not None

    def _rule(self, call: Call) -> Reason | None:
        """Return why the rules compute a call; None if it should be forecast."""
        here, state = call.here, call.state
        first = self.warmup if self.warmup >= 1 else round(self.warmup * here.num_steps)
        if here.step < first or here.step >= here.num_steps - self.tail:
            return Reason.of("edges", first=first, last=self.tail)
        if self.max_skips is not None and state.skips >= self.max_skips:
            return Reason.of("max_skips", most=self.max_skips)
        others = [one for one in attachments(call.attachment.target) if one is not call.attachment]
        refreshing = next((one.mechanism.name for one in others if one.mechanism.needs_step(one, here)), None)
        if refreshing is not None:
            return Reason.of("anchor", mechanism=refreshing)
        if self.gate.shared and here.step in self._decisions:
            return self._decisions[here.step]
        wanted = self._vote(call, self.gate.computes(here, state.memory, call.lead(call.signal)))
        return Reason.of("gate", gate=type(self.gate).__name__) if wanted else None

    def _vote(self, call: Call, wanted: bool) -> bool:
        """Compute on all ranks if one wants to; only gates that observe tensors can disagree."""
        group = self.group
        if self.gate.signal == "none":
            return wanted
        if group is None:
            group = diffusers_compat.context_parallel_group(unwrap(call.attachment.models[call.component]))
        if group is None:
            return wanted
        vote = torch.tensor(int(wanted))
        torch.distributed.all_reduce(vote, op=torch.distributed.ReduceOp.MAX, group=group)
        return bool(vote)

    def _why_not_forecast(self, call: Call) -> Reason | None:
        """Set the weights of a forecast; return why a step cannot be forecast, or None."""
        state = call.state
        for part in call.parts:
            anchors = state.anchors.get(part, [])
            weights = self.forecaster.weights(anchors, call.here, state.memory)
            if weights is None or not anchors:
                return Reason("nothing_to_forecast_from")
            call.weights[part] = weights
        if call.here.step - state.last_step > 1 and not _branches_are_left_out(call.attachment.target):
            return Reason("branch_not_called")
        return None

    def _close(self, call: Call, output: Any) -> None:
        here, state, computed = call.here, call.state, bool(call.computed)
        # let the gate update its memory
        seen = call.lead(as_one(flatten(output)[0])) if computed and self.gate.signal == "input" else None
        self.gate.note(here, state.memory, call.lead(call.signal), computed, seen)
        # branch state: computed steps, forecasts in a row
        if computed:
            for part in call.parts:
                known = state.anchors.get(part, [])
                state.anchors[part] = [Anchor(here.step, here.sigma), *known][: self.forecaster.depth]
        state.skips = 0 if computed else state.skips + 1
        state.last_step = here.step
        # statistics
        self._strip.setdefault(here.branch, {})[here.step] = computed
        share = 1.0 if computed else self._shares.get(call.component, 0.0)
        self._executed += share
        self._called += 1
        self._skipped += not computed
        # tell solvers with history that this output is a forecast
        scheduler = scheduler_of(call.attachment.target)
        if hasattr(type(scheduler), "forecast_output"):  # a solver with history; see FlowMatchAB2Scheduler
            scheduler.forecast_output = not computed  # pyright: ignore[reportOptionalMemberAccess]
        if self.on_decision is not None:
            self.on_decision(here, computed)

    def _reset(self, run: int | None) -> None:
        """Forget what belongs to another run; totals stay."""
        if run is None:
            self._executed, self._called, self._runs, self._skipped = 0.0, 0, 0, 0
            self._computed: Counter[Reason] = Counter()
            self._shares: dict[str, float] = {}
        else:
            self._runs += 1
        self._run = run
        self._states: dict[tuple[str, str], BranchState] = {}
        self._decisions: dict[int, Reason | None] = {}
        self._strip: dict[str, dict[int, bool]] = {}
        self._sigmas: tuple[float, ...] = ()

    def set_residual_cost(self, component: str, share: float) -> None:
        """Set the fraction of a network's work that a forecast step still does, counted in blocks."""
        self._shares[component] = share

    # --------------------------------------------------------------------- report

    def decisions(self) -> dict[str, dict[int, bool]]:
        """Return, for the newest run, by branch and step, whether the step was computed."""
        return {branch: dict(steps) for branch, steps in self._strip.items()}

    def reasons(self) -> Counter[Reason]:
        """Return why calls were computed since the cache was attached, and how often; also where some were skipped."""
        reasons = Counter(self._computed)
        if self._attachment is None:
            return reasons
        for reason in (NO_STEP_CONTEXT, GRADIENTS, SHAPES_CHANGED):
            reasons[reason] += self._attachment.inactive[str(reason)]
        others = attachments(self._attachment.target)
        untracked = next((one.inactive for one in others if one.mechanism.name == StepTracker.name), Counter())
        if reasons[NO_STEP_CONTEXT] and untracked:
            del reasons[NO_STEP_CONTEXT]
            reasons.update({Reason.of("step_not_found", reason=text): count for text, count in untracked.items()})
        return +reasons  # those that happened

    def why_inactive(self) -> str:
        """Return why no step was skipped since the cache was attached; empty if some were."""
        if self._skipped or self._attachment is None:
            return "" if self._skipped else "it is not attached"
        reasons = self.reasons()
        del reasons[SHAPES_CHANGED]  # such calls count under another reason too
        calls = reasons.total()
        causes = [f"{reason}: {count} of {calls} calls" for reason, count in reasons.most_common() if count]
        return "; ".join(causes) or "the network was not called"

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return the cost (fraction of the calls' work that was done), and the newest run's steps.

        "skipped" counts the calls that were forecast since the cache was attached; if none was, "why_inactive" says
        why. "missed" counts, by reason, the calls that were computed though the gate did not ask for them, also
        where others were forecast.

        Work is counted in blocks: embeddings and the last projection, which regions within the network run at every
        step, are one percent or less of a network of usual depth.

        "strip" has one letter a step: C computed, a dot forecast, a space not called.
        """
        return {
            "gate": type(self.gate).__name__,
            "forecaster": type(self.forecaster).__name__,
            "region": type(self.region).__name__,
            "runs": self._runs,
            "cost": self._executed / self._called if self._called else 1.0,
            "executed": self._executed,
            "asked": self._called,
            "skipped": self._skipped,
            "why_inactive": self.why_inactive(),
            "missed": {str(one): count for one, count in self.reasons().items() if one.key in FAILURES},
            "decisions": self.decisions(),
            "strip": {branch: _strip(steps) for branch, steps in self._strip.items()},
        }


def _branches_are_left_out(target: Any) -> bool:
    """Return whether calls for a branch of guidance are left out at some steps, which is no reason to compute later."""
    return any(one.mechanism.stage is Stage.GUIDANCE for one in attachments(target))


def _parts_of(
    target: Any, model: nn.Module, here: StepContext, args: tuple, kwargs: dict[str, Any]
) -> tuple[str, ...]:
    """Return the branches in the batch of a call, in order; the call's own where none is ever left out.

    Lists of samples have no dimension for the batch: their branches are kept apart.
    """
    if here.branch != "all" or not _branches_are_left_out(target):
        return (here.branch,)
    family = call_family_of(model)
    layout = family.branches(target) or family.branches()
    if layout is None or layout.kind != "batched" or set(layout.order) != {LEAD, "uncond"}:
        return (here.branch,)
    latents = family.bind(model, args, kwargs).get(family.latent_argument)
    return tuple(layout.order) if isinstance(latents, torch.Tensor) else (here.branch,)


def _strip(steps: dict[int, bool]) -> str:
    return "".join({True: "C", False: ".", None: " "}[steps.get(step)] for step in range(max(steps) + 1))


def _refuse(*_: Any, **__: Any) -> None:
    raise AttachError("a tessera step cache is on this network; detach it before enabling a cache of diffusers")


def _outside_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep decisions out of compiled graphs; what the function calls is still compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return torch.compiler.disable(call, recursive=False)


def _noise_levels(target: Any, here: StepContext) -> tuple[float, ...]:
    """Return the run's noise levels if the scheduler has them and they fit the call, else none."""
    scheduler = scheduler_of(target)
    if getattr(scheduler, "timesteps", None) is None:
        return ()
    table = SigmaSchedule.of(scheduler)
    if len(table) < here.num_steps:
        return ()
    sigmas = table.last(here.num_steps).sigmas
    return sigmas if abs(sigmas[here.step] - here.sigma) <= 1e-4 * max(1.0, abs(here.sigma)) else ()
