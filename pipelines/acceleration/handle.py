"""An acceleration on a pipeline: applied in a declared order, undone in reverse, reported part by part."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from pipelines.acceleration.conflicts import check_together
from pipelines.acceleration.on_memory import DecoderTilingSwitch, OffloadSwitch
from pipelines.acceleration.on_networks import AttentionSwitch, CompileSwitch
from pipelines.acceleration.on_quantization import QuantizationSwitch
from pipelines.acceleration.on_scales import KVCacheSwitch, NextScaleSwitch
from pipelines.acceleration.on_steps import FewStepSwitch, GuidanceCacheSwitch, ParallelSwitch, StepCacheSwitch
from pipelines.acceleration.parts import CompilePart, Part
from pipelines.acceleration.report import AccelerationReport
from pipelines.acceleration.switch import Switch, Undo
from pipelines.acceleration.texts import AccelerationError

_HANDLES = "_acceleration_handles"

SWITCHES: Mapping[str, type[Switch[Any]]] = {
    "quantization": QuantizationSwitch,  # layers that all others find in place
    "few_step": FewStepSwitch,  # caches and resolvers read the scheduler that it brings
    "offload": OffloadSwitch,  # moves weights, which everything else finds in place
    "attention": AttentionSwitch,
    "step_cache": StepCacheSwitch,
    "guidance_cache": GuidanceCacheSwitch,
    "parallel": ParallelSwitch,
    "kv_cache": KVCacheSwitch,
    "next_scale": NextScaleSwitch,
    "decoder_tiling": DecoderTilingSwitch,
    "compile": CompileSwitch,  # with the hooks of all others
}
"""Part -> what applies it, in the order of application. Among mechanisms on a network their `Stage` decides."""


def order_of(parts: Mapping[str, Part]) -> list[str]:
    """Return the names of parts in the order of application.

    Blocks are compiled before a step cache is attached, which then goes around their compiled code: inside it a graph
    would hold the number of the block and the decision of the step.
    """
    order = [name for name in SWITCHES if name in parts]
    compiled = parts.get("compile")
    if isinstance(compiled, CompilePart) and compiled.scope == "blocks" and "step_cache" in order:
        order.remove("compile")
        order.insert(order.index("step_cache"), "compile")
    return order


class AccelerationHandle:
    """An acceleration that is applied; also a context manager that takes it back at its end.

    Args:
        parts: by name, as in `AccelerationConfig`.
        pipe: of ours or diffusers.

    Attributes:
        call_arguments: what calls of the pipeline must be given; empty for our pipelines, whose calls take them by
            themselves unless the caller names others.

    Raises:
        AccelerationError: the pipeline can't have a part, or has it already; then nothing is applied.
    """

    def __init__(self, parts: Mapping[str, Part], pipe: Any) -> None:
        self.pipe = pipe
        self.parts = {name: parts[name] for name in order_of(parts)}
        self.call_arguments: dict[str, Any] = {}
        self._last_report: AccelerationReport | None = None
        self._switches: list[Switch[Any]] = []
        self._undo = Undo()
        before = applied_parts(pipe)
        for name in self.parts:
            if name in before:
                raise AccelerationError("refused.already_applied", part=name)
        check_together({**before, **self.parts})
        try:
            for name, part in self.parts.items():
                switch = SWITCHES[name](part, pipe, {**before, **self.parts})
                switch.apply(self._undo)
                self._switches.append(switch)
                self.call_arguments |= switch.call_arguments
        except BaseException:
            self._undo.close()
            raise
        vars(pipe).setdefault(_HANDLES, []).append(self)

    @property
    def is_applied(self) -> bool:
        """Whether the acceleration is still on the pipeline."""
        return self._last_report is None

    def report(self) -> AccelerationReport:
        """Return what each part did; after `undo()` how things stood then."""
        if self._last_report is not None:
            return self._last_report
        return AccelerationReport(tuple(switch.report() for switch in self._switches))

    def mechanism(self, part: str) -> Any:
        """Return what a part attached to the networks; None without the part, or for one that attaches nothing."""
        switch = next((one for one in self._switches if one.name == part), None)
        return getattr(switch, "mechanism", None)

    def undo(self) -> None:
        """Take everything back: the pipeline computes the same bits as before. A second call does nothing.

        Raises:
            AccelerationError: another acceleration was applied after this one.
        """
        if not self.is_applied:
            return
        handles = vars(self.pipe)[_HANDLES]
        if handles[-1] is not self:
            raise AccelerationError("refused.not_last")
        last = self.report()
        self._undo.close()
        self._last_report = last
        handles.pop()
        if not handles:
            del vars(self.pipe)[_HANDLES]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def applied_parts(pipe: Any) -> dict[str, Part]:
    """Return the parts of all accelerations on a pipeline by name."""
    handles: list[AccelerationHandle] = vars(pipe).get(_HANDLES, [])
    return {name: part for handle in handles for name, part in handle.parts.items()}
