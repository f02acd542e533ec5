"""The part that quantizes networks: layers put in and taken out bit-exactly, precision by step, what was computed."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, ClassVar

from torch import nn

from dit.quant.step_policy import StepPolicy
from dit.runtime.diffusers_compat import is_offloaded
from dit.runtime.hooks import AttachError, Attachment, Mechanism, attachments, find_networks
from dit.runtime.stages import Stage
from pipelines.acceleration.quantization import QuantizationPart
from pipelines.acceleration.report import PartReport, Reason
from pipelines.acceleration.switch import Switch, Undo
from pipelines.quantization.layers import QuantizedNetwork
from pipelines.quantization.loading import layer_plans
from pipelines.quantization.networks import kernel_calls, network_bytes, quantization_of, quantized_layers_of
from pipelines.quantization.steps import StepCounter, StepPrecision, stored_policy
from sampling.sigma_schedule import scheduler_of
from sampling.step_tracker import TrackedAttachment

MIB = 2**20


class QuantizedLayers(Mechanism):
    """Quantized layers in the networks of a pipeline, and their precision by step.

    Args:
        networks: with layers to put in; none where the networks are quantized already.
        policy: at which steps activations keep 16 bits; None at none.
        components: of the pipeline, by name.
    """

    name: ClassVar[str] = "quantized_layers"
    stage: ClassVar[Stage] = Stage.QUANTIZATION

    def __init__(
        self, networks: list[QuantizedNetwork], policy: StepPolicy | None, components: tuple[str, ...] | None
    ) -> None:
        self.networks, self.components = networks, components
        self.counter = None if policy is None else StepCounter(policy)

    def install(self, attachment: Attachment) -> None:
        """Put the layers in, and watch the steps."""
        for one in self.networks:
            one.put_in()
            attachment.on_detach(one.take_out)
        if self.counter is not None:
            self.counter.install(attachment)
        attachment.on_detach(lambda: None)  # else one that only reports would count as attached to nothing

    def attach(self, target: Any) -> Attachment:
        """Attach to a pipeline; its steps are found where they matter."""
        has_steps = self.counter is not None and scheduler_of(target) is not None
        return TrackedAttachment(self, target) if has_steps else _UntrackedAttachment(self, target)


class _UntrackedAttachment(TrackedAttachment):
    """An attachment that needs no step tracker; the one that others brought leaves with it, if it is the last."""

    def __init__(self, mechanism: Mechanism, target: Any) -> None:
        Attachment.__init__(self, mechanism, target)


class QuantizationSwitch(Switch[QuantizationPart]):
    """Quantize networks, or take those that are as they are."""

    name: ClassVar[str] = "quantization"
    mechanism: Any = None
    attachment: Attachment
    sizes: tuple[int, int] = (0, 0)

    def apply(self, undo: Undo) -> None:
        """Apply the part to the pipeline; the undo goes on the stack."""
        found = self._found()
        self.title = self._already(found)
        quantized = [] if self.title else self._quantize(found)
        self.title = self.title or self.part.name
        policy = self.part.policy or self._stored(found)
        self._take_policy_off(undo)
        self.mechanism = QuantizedLayers(quantized, policy, self.part.components)
        try:
            self.attachment = undo.enter_context(self.mechanism.attach(self.pipe))
        except (AttachError, ValueError) as error:
            raise self.refuse("not_attached", reason=str(error)) from error
        self.models = list(found.values())
        self.before = kernel_calls(self.models)
        sizes = [network_bytes(one) for one in self.models]
        self.sizes = sum(plain for plain, _ in sizes), sum(now for _, now in sizes)
        self.layers = sum(len(quantized_layers_of(one)) for one in self.models)

    def _found(self) -> dict[str, nn.Module]:
        """Return the networks by component."""
        try:
            return find_networks(self.pipe, self.part.components)
        except AttachError as error:
            raise self.refuse("no_network", reason=str(error)) from error

    def _already(self, found: dict[str, nn.Module]) -> str:
        """Return how the networks are quantized already, if that is what the part asks for; empty if they aren't.

        Raises:
            AccelerationError: they are quantized in another way, or the part asks for what they are and they aren't.
        """
        names = {name: quantization_of(network) for name, network in found.items()}
        known = [one for one in names.values() if one]
        if not known and self.part.bits is None:
            raise self.refuse("not_quantized")
        if known and self.part.bits is not None and set(names.values()) != {self.part.name}:
            raise self.refuse("already_quantized", found=", ".join(dict.fromkeys(known)), asked=self.part.name)
        if known and not any(quantized_layers_of(network) for network in found.values()):
            raise self.refuse("other_quantization", found=", ".join(dict.fromkeys(known)))
        return ", ".join(dict.fromkeys(known))

    def _quantize(self, found: dict[str, nn.Module]) -> list[QuantizedNetwork]:
        """Make the quantized layers."""
        if any(is_offloaded(network) for network in found.values()):
            raise self.refuse("offloaded_before")
        attached = [one.mechanism for one in attachments(self.pipe)]
        above = [one.name for one in attached if Stage.ATTENTION <= one.stage < Stage.OTHER]
        if above:
            raise self.refuse("not_first", others=above)
        try:
            plans = layer_plans(self.pipe, self.part, found)
            return [QuantizedNetwork(found[name], plan) for name, plan in plans.items()]
        except (ValueError, OSError) as error:  # of a calibration that doesn't fit, or weights that can't be quantized
            raise self.refuse("not_attached", reason=str(error)) from error

    def _stored(self, found: dict[str, nn.Module]) -> StepPolicy | None:
        """Return the policy that the networks' configurations name."""
        try:
            known = [stored_policy(network) for network in found.values() if quantized_layers_of(network)]
        except ValueError as error:
            raise self.refuse("not_attached", reason=str(error)) from error
        return next((one for one in known if one is not None), None)

    def _take_policy_off(self, undo: Undo) -> None:
        """Take off the policy that a loaded pipeline follows, which the part's replaces for the time."""
        for one in attachments(self.pipe):
            if isinstance(one.mechanism, StepPrecision):
                one.detach()
                undo.callback(partial(one.mechanism.attach, self.pipe))

    def report(self) -> PartReport:
        """Report what the part did, or why it did nothing."""
        calls: Counter[str] = kernel_calls(self.models)
        calls.subtract(self.before)
        counter = self.mechanism.counter
        made = {name: count for name, count in sorted(calls.items()) if count > 0}
        values: dict[str, Any] = {
            "name": self.title,
            "layers": self.layers,
            "before_mib": self.sizes[0] / MIB,
            "after_mib": self.sizes[1] / MIB,
            "kernels": made,
            "calls": [f"{count} x {name}" for name, count in made.items()] or ["0"],
            "steps": 0 if counter is None else counter.steps,
            "full_steps": 0 if counter is None else counter.full,
        }
        reasons = [
            Reason("why.no_step_context", {"count": count})
            for text, count in self.attachment.inactive.items()
            if text == "no step context"
        ]
        if not made:
            reasons.append(Reason("why.networks_not_called"))
        elif set(made) == {"full_precision"}:
            reasons.append(Reason("why.all_full_precision", {"steps": values["steps"]}))
        elif "dequantize" in made:
            reasons.append(Reason("why.dequantized", {"count": made["dequantize"]}))
        is_active = bool(set(made) - {"full_precision"})
        key = "quantization" if counter is None else "quantization.steps"
        return PartReport(self.name, key, values, is_active, tuple(reasons))
