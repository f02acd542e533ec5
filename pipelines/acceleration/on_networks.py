"""Parts that change how networks are computed: the attention backend, compilation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from dit.attention import attention_backend_table
from dit.attention.backend_scope import backend_scope
from dit.attention.mechanism import PlannedAttention
from dit.runtime import diffusers_compat
from dit.runtime.families import call_family_of
from dit.runtime.hooks import Attachment
from dit.runtime.state import unwrap
from pipelines.acceleration.parts import AttentionPart, CompilePart
from pipelines.acceleration.report import PartReport, Reason
from pipelines.acceleration.switch import Switch, Undo, is_next_scale, require_steps
from pipelines.quantization.carried import carried_plan
from sampling.step_tracker import TrackedAttachment

NETWORKS = ("transformer", "transformer_2", "unet")
"""Components whose attention a backend is chosen for; text encoders and decoders keep their own."""


class TrackedAttention(PlannedAttention):
    """Attention by a plan on a pipeline whose steps are tracked meanwhile."""

    def attach(self, target: Any) -> Attachment:
        """Attach to a pipeline; its steps are found too."""
        return TrackedAttachment(self, target)


class AttentionSwitch(Switch[AttentionPart]):
    """Have the attention layers of the denoising networks use a backend, or follow a plan."""

    name: ClassVar[str] = "attention"
    layers: int = 0
    before: frozenset[str] = frozenset()
    mechanism: Any = None
    attachment: Attachment | None = None

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        if self.part.backend is None:
            self._attach_plan(undo)
        else:
            self._set_backend(undo)

    def _attach_plan(self, undo: Undo) -> None:
        """Attach the plan, and what finds the steps of the pipeline."""
        require_steps(self)
        try:
            plan = self.part.make_plan(getattr(self.pipe, "name_or_path", None))
            plan = carried_plan(plan, self.networks().values())
            self.mechanism = TrackedAttention(plan, any_weights=self.part.any_weights)
        except (ValueError, OSError) as error:  # of a file that doesn't fit or is none
            raise self.refuse("not_attached", reason=str(error)) from error
        self.attachment = self.attach(self.mechanism, undo)

    def _set_backend(self, undo: Undo) -> None:
        found = [getattr(self.pipe, name, None) for name in NETWORKS]
        networks = [unwrap(network) for network in found if isinstance(network, nn.Module)]
        if not networks:
            raise self.refuse("no_network", reason=f"none of {', '.join(NETWORKS)}")
        reason, accepted = self._why_not(networks[0])
        if reason:
            raise self.refuse("backend", backend=self.part.backend, reason=reason, accepted=accepted)
        self.before = frozenset(diffusers_compat.chosen_attention_backends(networks))
        self.layers = undo.enter_context(backend_scope(networks, str(self.part.backend)))
        if not self.layers:
            raise self.refuse("no_choice")

    def _why_not(self, network: nn.Module) -> tuple[str, list[str]]:
        """Return why the backend can't run on the pipeline's device (empty if it can), and all backend names."""
        table = attention_backend_table()
        backend = table.get(str(self.part.backend))
        names = [name for name, one in table.items() if not one.fetches]
        if backend is None:
            return "there is none of this name", names
        device = getattr(self.pipe, "_execution_device", None) or next(network.parameters()).device
        dtype = next((one.dtype for one in network.parameters() if one.is_floating_point()), torch.float32)
        return backend.can_run(device, dtype, call=not backend.compiles), names

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        if self.attachment is not None:
            return self._report_plan(self.attachment)
        values = {"backend": self.part.backend, "layers": self.layers}
        if self.before == {self.part.backend}:
            return self.make_report(values, False, Reason("why.same_backend"))
        return self.make_report(values, True)

    def _report_plan(self, attachment: Attachment) -> PartReport:
        """Report how many calls were sparse, how dense these were, and why others were not."""
        done = attachment.report()
        values = {
            "pattern": self.part.pattern or "plan",
            "sparse": done["sparse"],
            "calls": done["sparse"] + done["dense"],
            "density": 1.0 if done["density"] is None else done["density"],
            "layers": len(done["layers"]),
        }
        reasons = [
            Reason("why.no_step_context", {"count": count})
            if text == "no step context"
            else Reason("why.dense_calls", {"reason": text, "count": count})
            for text, count in done["dense_reasons"].items()
        ]
        if not values["calls"]:
            reasons = [Reason("why.networks_not_called")]
        return PartReport(self.name, "attention.plan", values, done["sparse"] > 0, tuple(reasons))


class CompileSwitch(Switch[CompilePart]):
    """Compile the denoising networks, with everything that is attached to them."""

    name: ClassVar[str] = "compile"

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        self.modules, self.calls = 0, 0
        options = self.part.model_dump(exclude={"scope"}, exclude_none=True)
        for network in self.networks().values():
            for module in self._scope(unwrap(network)):
                undo.enter_context(self._compiled(module, options))
                self.modules += 1

    def _scope(self, network: nn.Module) -> list[nn.Module]:
        """Return the modules of a network that are compiled."""
        if self.part.scope == "network":
            if is_next_scale(self.pipe):
                raise self.refuse("no_whole_network")
            return [network]
        names = getattr(network, "_repeated_blocks", None) or ()
        blocks = [part for part in network.modules() if type(part).__name__ in names]
        if not blocks:  # diffusers doesn't name them for all of its networks
            blocks = [block for _, block in call_family_of(network).blocks(network)]
        if not blocks:
            raise self.refuse("no_blocks", network=type(network).__name__)
        return blocks

    @contextmanager
    def _compiled(self, module: nn.Module, options: dict[str, Any]) -> Any:
        """Have a module run compiled for a time."""
        own = vars(module)
        before = own.get("_compiled_call_impl")
        module.compile(**options)
        own["_compiled_call_impl"] = self._counting(own["_compiled_call_impl"])
        try:
            yield
        finally:
            del own["_compiled_call_impl"]
            if before is not None:
                own["_compiled_call_impl"] = before

    def _counting(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Count calls outside of the compiled code."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return compiled(*args, **kwargs)

        return call

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        values = {"modules": self.modules, "calls": self.calls, "scope": self.part.scope}
        reasons = () if self.calls else (Reason("why.not_called"),)
        return self.make_report(values, self.calls > 0, *reasons)
