"""Parts that act across denoising steps: few-step presets, step caches, guidance caches, parallel processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from dit.runtime.hooks import AttachError, Attachment
from dit.runtime.state import unwrap
from pipelines.acceleration.parts import FewStepPart, GuidanceCachePart, ParallelPart, StepCachePart
from pipelines.acceleration.report import PartReport, Reason
from pipelines.acceleration.switch import Switch, Undo, require_steps
from pipelines.quantization.carried import carried_profile
from sampling.step_cache.reasons import FAILURES


class FewStepSwitch(Switch[FewStepPart]):
    """Swap the scheduler; number of steps and guidance become arguments of the calls."""

    name: ClassVar[str] = "few_step"

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        require_steps(self)
        before = getattr(self.pipe, "scheduler", None)
        if before is None:
            raise self.refuse("other_model", preset=self.part.preset, reason="it has no scheduler")
        undo.callback(setattr, self.pipe, "scheduler", before)
        try:
            arguments = self.part.settings.apply(self.pipe)
        except ValueError as error:
            raise self.refuse("other_model", preset=self.part.preset, reason=str(error)) from error
        if "num_inference_steps" in arguments:
            arguments["num_inference_steps"] = self.part.number_of_steps
        self.set_call_arguments(arguments, undo)

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        settings, steps = self.part.settings, self.part.number_of_steps
        values = {
            "preset": self.part.preset,
            "scheduler": settings.scheduler,
            "steps": steps,
            "guidance": settings.guidance,
            "lora_scale": settings.lora_scale,
        }
        scheduler: Any = self.pipe.scheduler
        if getattr(scheduler, "num_inference_steps", None) is None:  # None until a call sets timesteps
            return self.make_report(values, False, Reason("why.not_called"))
        found = len(scheduler.timesteps)
        if found != steps:
            return self.make_report(values, False, Reason("why.other_steps", {"found": found, "steps": steps}))
        return self.make_report(values, True)


class StepCacheSwitch(Switch[StepCachePart]):
    """Attach a step cache."""

    name: ClassVar[str] = "step_cache"
    mechanism: Any
    attachment: Attachment

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        from sampling.step_cache import StepCache

        require_steps(self)
        params = self._params()
        try:
            if "profile" in params:
                params = {**params, "profile": self._profile(params["profile"])}
            self.mechanism = StepCache.preset(self.part.preset, **params)
        except (ValueError, OSError) as error:  # of a profile that doesn't fit or is no file
            raise self.refuse("not_attached", reason=str(error)) from error
        if "parallel" in self.others:  # gates that look at tensors see another branch on each process
            from torch import distributed

            self.mechanism.group = distributed.group.WORLD if distributed.is_initialized() else None
        self.attachment = self.attach(self.mechanism, undo)

    def _params(self) -> dict[str, Any]:
        """Return the preset's parameters, with the profile of the model's folder where one is needed but not given."""
        if self.part.preset != "budget" or self.part.params.get("profile") is not None:
            return self.part.params
        from pipelines.step_cache import find_profile

        try:
            return {**self.part.params, "profile": find_profile(self.pipe)}
        except ValueError as error:
            raise self.refuse("no_profile", folder=getattr(self.pipe, "name_or_path", None)) from error

    def _profile(self, given: Any) -> Any:
        """Return a profile, or the one in a file; one of the network before it was quantized is bound to it."""
        from sampling.step_cache import Profile

        found = given if isinstance(given, Profile) else Profile.load(self._beside_model(str(given)))
        return carried_profile(found, self.networks().values())

    def _beside_model(self, file: str) -> Path:
        """Return a file: a bare name means one of the model's folder, if it has one of this name."""
        beside = Path(getattr(self.pipe, "name_or_path", None) or ".") / file
        return beside if Path(file).name == file and beside.is_file() else Path(file)

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        done = self.attachment.report()
        values = {
            "preset": self.part.preset,
            "skipped": done["skipped"],
            "called": done["asked"],
            "cost": done["cost"],
            "strip": done["strip"],
        }
        is_active, counts = done["skipped"] > 0, self.mechanism.reasons()
        reasons = [
            Reason(f"step_cache.{one.key}", {**dict(one.values), "count": count})
            for one, count in counts.most_common()
            if not is_active or one.key in FAILURES
        ]
        if is_active:  # one branch may be forecast and another never
            never = [branch for branch, strip in done["strip"].items() if "." not in strip]
            reasons += [Reason("why.branch_never_skipped", {"branch": branch}) for branch in never]
        elif not reasons:
            reasons = [Reason("why.networks_not_called")]
        return self.make_report(values, is_active, *reasons)


class GuidanceCacheSwitch(Switch[GuidanceCachePart]):
    """Attach what leaves out the unconditional branch."""

    name: ClassVar[str] = "guidance_cache"
    mechanism: Any
    attachment: Attachment

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        from sampling.guidance_caching import CachedGuidance
        from sampling.step_cache.forecasters import Newton, Reuse

        require_steps(self)
        forecaster = Newton(1) if self.part.forecaster == "newton" else Reuse()
        self.mechanism = CachedGuidance(self.part.interval, self.part.every, forecaster)
        self.attachment = self.attach(self.mechanism, undo)

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        done = self.attachment.report()
        computed, skipped = done["uncond_computed"], done["uncond_skipped"]
        values = {"left_out": len(skipped), "steps": len(computed) + len(skipped), "computed_steps": computed}
        reasons = self.skips(self.attachment)
        if not skipped and not reasons:
            key = "why.not_called" if not done["calls"] else "why.every_step_computed" if computed else "why.one_branch"
            reasons = [Reason(key)]
        return self.make_report(values, bool(skipped), *reasons)


class ParallelSwitch(Switch[ParallelPart]):
    """Divide calls over processes."""

    name: ClassVar[str] = "parallel"
    attachment: Attachment | None = None

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        from sampling.parallel import GuidanceParallel, context_parallel

        require_steps(self)
        found = self._processes()
        if self.part.kind == "guidance" and found != 2:
            raise self.refuse("no_processes", kind=self.part.kind, wanted=2, found=found)
        if found < 2:
            raise self.refuse("no_processes", kind=self.part.kind, wanted="2 or more", found=found)
        if self.part.kind == "guidance":
            self.attachment = self.attach(GuidanceParallel(), undo)
            return
        try:
            for model in self.networks().values():
                undo.callback(context_parallel(unwrap(model)))
        except (AttachError, ValueError) as error:
            raise self.refuse("not_attached", reason=str(error)) from error

    @staticmethod
    def _processes() -> int:
        from torch import distributed

        is_started = distributed.is_available() and distributed.is_initialized()
        return distributed.get_world_size() if is_started else 1

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        values = {"kind": self.part.kind, "processes": self._processes()}
        if self.attachment is None:
            return self.make_report(values, True)
        reasons, calls = self.skips(self.attachment), self.attachment.calls
        if not calls:
            reasons = [Reason("why.not_called")]
        return self.make_report(values, calls > self.attachment.inactive.total(), *reasons)
