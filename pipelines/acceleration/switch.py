"""What applies one part to one pipeline, and takes it back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from dit.runtime.attachment import AttachError, Attachment, Mechanism, attachments, find_networks
from pipelines.acceleration.parts import Part
from pipelines.acceleration.report import PartReport, Reason
from pipelines.acceleration.texts import AccelerationError
from pipelines.call_defaults import has_call_defaults, setting_call_defaults
from sampling.resolve import CoordinateResolver

P = TypeVar("P", bound=Part)

SKIPS = {
    "the call has one branch only": "why.one_branch",
    "the order of the branches in the batch is not known": "why.branch_order",
    "the unconditional call comes before the conditional one": "why.uncond_first",
}
"""Reasons of mechanisms for a call that they left alone -> key of the text."""


T = TypeVar("T")


class Undo:
    """Steps that take an acceleration back, the last one first; one that fails stays, and so do those before it."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def callback(self, function: Callable[..., object], *arguments: Any) -> None:
        """Add a call."""
        self._steps.append(partial(function, *arguments))

    def enter_context(self, manager: AbstractContextManager[T]) -> T:
        """Enter a context that is left on the way back."""
        value = manager.__enter__()
        self.callback(manager.__exit__, None, None, None)
        return value

    def close(self) -> None:
        """Take all steps; a second call takes those that are left."""
        while self._steps:
            self._steps[-1]()
            self._steps.pop()


class Switch(ABC, Generic[P]):
    """A part on a pipeline.

    Args:
        part: what was asked for.
        pipe: of ours or diffusers.
        others: all parts of the acceleration by name.

    Attributes:
        name: of the part.
        call_arguments: what calls of the pipeline must be given, where it reads no defaults.
    """

    name: ClassVar[str]

    def __init__(self, part: P, pipe: Any, others: dict[str, Part]) -> None:
        self.part, self.pipe, self.others = part, pipe, others
        self.call_arguments: dict[str, Any] = {}

    @abstractmethod
    def apply(self, undo: Undo) -> None:
        """Apply the part.

        Args:
            undo: gets everything that takes it back.

        Raises:
            AccelerationError: the pipeline can't have it.
        """

    @abstractmethod
    def report(self) -> PartReport:
        """Return what the part did so far."""

    # ------------------------------------------------------------------- for subclasses

    @property
    def pipeline(self) -> str:
        """Class of the pipeline, for messages."""
        return type(self.pipe).__name__

    def make_report(self, values: dict[str, Any], is_active: bool, *reasons: Reason) -> PartReport:
        """Return a report under the part's name."""
        return PartReport(self.name, self.name, values, is_active, reasons)

    def refuse(self, key: str, **values: Any) -> AccelerationError:
        """Return a refusal of the pipeline."""
        return AccelerationError(f"refused.{key}", part=self.name, pipeline=self.pipeline, **values)

    def networks(self) -> dict[str, Any]:
        """Return the pipeline's denoising networks by component."""
        try:
            return find_networks(self.pipe)
        except AttachError as error:
            raise self.refuse("no_network", reason=str(error)) from error

    def attach(self, mechanism: Mechanism, undo: Undo) -> Attachment:
        """Attach a mechanism."""
        self.networks()
        try:
            return undo.enter_context(mechanism.attach(self.pipe))
        except (AttachError, ValueError) as error:
            raise self.refuse("not_attached", reason=str(error)) from error

    def set_call_arguments(self, arguments: dict[str, Any], undo: Undo) -> None:
        """Have calls of the pipeline take arguments: by themselves if it reads defaults, else they are handed out."""
        if not has_call_defaults(self.pipe):
            self.call_arguments = dict(arguments)
            return
        try:
            undo.enter_context(setting_call_defaults(self.pipe, arguments))
        except TypeError as error:
            raise self.refuse("no_argument", argument=", ".join(arguments)) from error

    def skips(self, attachment: Attachment) -> list[Reason]:
        """Why an attachment left calls alone."""
        found = []
        for text, count in attachment.inactive.items():
            if text == "no coordinates":
                found += self._unplaced() or [Reason("why.no_coordinates", {"count": count})]
            elif text in SKIPS:
                found.append(Reason(SKIPS[text], {"count": count}))
            else:
                found.append(Reason("why.other", {"reason": text, "count": count}))
        return found

    def _unplaced(self) -> list[Reason]:
        """Why the pipeline's resolver did not find the step of calls."""
        resolvers = [one for one in attachments(self.pipe) if isinstance(one.mechanism, CoordinateResolver)]
        counts = [item for one in resolvers for item in one.inactive.items()]
        return [Reason("why.step_not_found", {"reason": text, "count": count}) for text, count in counts]


def is_next_scale(pipe: Any) -> bool:
    """Whether a pipeline generates scale by scale."""
    from pipelines.next_scale.base import NextScalePipeline

    return isinstance(pipe, NextScalePipeline)


def require_steps(switch: Switch[Any]) -> None:
    """Refuse pipelines that generate scale by scale.

    Raises:
        AccelerationError: the switch's pipeline is one.
    """
    if is_next_scale(switch.pipe):
        raise switch.refuse("no_steps")


def require_scales(switch: Switch[Any]) -> None:
    """Refuse pipelines that do not generate scale by scale.

    Raises:
        AccelerationError: the switch's pipeline is none.
    """
    if not is_next_scale(switch.pipe):
        raise switch.refuse("no_scales")
