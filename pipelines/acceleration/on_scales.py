"""Parts that are arguments of the calls of next-scale pipelines: the KV cache, and what is left out of scales."""

from __future__ import annotations

from typing import Any, ClassVar

from pipelines.acceleration.parts import KVCachePart, NextScalePart
from pipelines.acceleration.report import PartReport, Reason
from pipelines.acceleration.switch import Switch, Undo, require_scales
from pipelines.acceleration.texts import AccelerationError

MIB = 2**20


class KVCacheSwitch(Switch[KVCachePart]):
    """Have calls keep part of the history."""

    name: ClassVar[str] = "kv_cache"
    before: Any = None

    def apply(self, undo: Undo) -> None:
        """See `Switch.apply`."""
        require_scales(self)
        self.before = self.pipe.last_options
        self.set_call_arguments(self.part.call_arguments, undo)

    def report(self) -> PartReport:
        """See `Switch.report`."""
        options, kept = self.pipe.last_options, self.pipe.kv_report
        asked = self.part.call_arguments
        named = [] if options is None else [name for name, value in asked.items() if getattr(options, name) != value]
        if options is self.before or kept is None or named:
            values = {"policy": self.part.policy, "budget": self.part.budget}
            reason = Reason("why.not_called")
            if options is not self.before and named:
                reason = Reason("why.call_argument", {"argument": named})
            return PartReport(self.name, "kv_cache.before", values, False, (reason,))
        values = {
            "policy": kept.policy,
            "budget": self.part.budget,
            "dtype": kept.kv_dtype,
            "share": kept.share,
            "peak_mib": kept.peak_bytes / MIB,
            "full_mib": kept.full_bytes / MIB,
        }
        if self.part.policy != "full" and kept.share >= 1:
            idle = Reason("why.all_kept", {"budget": self.part.budget})
            return self.make_report(values, self.part.dtype != "auto", idle)
        return self.make_report(values, True)


class NextScaleSwitch(Switch[NextScalePart]):
    """Have calls leave work out at late scales."""

    name: ClassVar[str] = "next_scale"
    before: Any = None
    acceleration: Any = None

    def apply(self, undo: Undo) -> None:
        """See `Switch.apply`."""
        require_scales(self)
        self.acceleration = self.part.acceleration(self._refiner())
        try:
            self.acceleration.at(self.pipe.transformer.grids)
        except ValueError as error:
            raise AccelerationError("refused.value", field=self.name, reason=str(error)) from error
        self.before = self.pipe.last_options
        self.set_call_arguments({"acceleration": self.acceleration}, undo)

    def _refiner(self) -> Any:
        """Load the transformer of the refiner to where the pipeline's is."""
        if self.part.refiner is None:
            return None
        from pipelines.loading.load import load_pipeline

        own = self.pipe.transformer
        loaded: Any = load_pipeline(self.part.refiner, device=own.device, dtype=own.dtype)
        found = getattr(loaded, "transformer", None)
        if found is None or type(found) is not type(own) or found.grids != own.grids:
            reason = f"the refiner {self.part.refiner!r} has no {type(own).__name__} of the same scales"
            raise self.refuse("not_attached", reason=reason)
        return found

    def report(self) -> PartReport:
        """See `Switch.report`."""
        options, done = self.pipe.last_options, self.pipe.acceleration_report
        if options is self.before or done is None or options.acceleration is not self.acceleration:
            is_other = options is not self.before and options.acceleration is not self.acceleration
            reason = Reason("why.call_argument", {"argument": "acceleration"}) if is_other else Reason("why.not_called")
            return PartReport(self.name, "next_scale.before", {}, False, (reason,))
        scales, total = done["scales"]
        values = {
            "scales": scales,
            "all_scales": total,
            "token_share": done["token_share"],
            "pruning": done["pruning"],
            **({"drift": done["drift"]} if "drift" in done else {}),
        }
        idle = [Reason("why.shortcut_idle", {"part": part, "reason": text}) for part, text in done["inactive"].items()]
        asked = [bool(self.part.skip_last), bool(self.part.prune), bool(self.part.unguided), self.acceleration.refiner]
        return self.make_report(values, sum(map(bool, asked)) > len(idle), *idle)
