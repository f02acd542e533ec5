"""Attach mechanisms to a network and detach them bit-exactly: one protocol, a declared order.

A `Mechanism` sets its hooks in `install` with the methods of its `Attachment`; `detach()` undoes all of them.
Mechanisms on one network form a stack, sorted by `Mechanism.stage`. Attaching or detaching one uninstalls those above
it and installs them again afterwards, so that each undoes exactly what it did, whatever the order of calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, wraps
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from dit.runtime.stages import Resource, Stage
from dit.runtime.state import StateStore, unwrap

if TYPE_CHECKING:
    from dit.runtime.families import AttentionLayer
    from dit.runtime.step_context import StepContext

_ATTACHMENTS = "_tessera_attachments"
_MISSING = object()
_ARRIVALS = count()


class AttachError(RuntimeError):
    """A mechanism cannot be attached or detached; the message says why and what to do."""


class Mechanism(ABC):
    """Something that changes or watches a network: sparse attention, a step cache, a quantizer, an observer.

    Attributes:
        name: unique among the mechanisms on a network; its tensors are kept under it.
        stage: position in the stack; lower is nearer to the network's own code.
        exclusive: what it must have for itself; two mechanisms that name the same thing refuse each other.
        components: which networks of a pipeline it attaches to, see `find_networks`; None means those that denoise.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = Stage.OTHER
    exclusive: ClassVar[frozenset[Resource]] = frozenset()
    components: Sequence[str] | None = None

    @abstractmethod
    def install(self, attachment: Attachment) -> None:
        """Set hooks on the networks `attachment.models` with the attachment's methods.

        It may be called again: state that must outlive that belongs to `attachment.state` or to the mechanism.

        Args:
            attachment: offers `layers`, `pre_hook`, `post_hook`, `wrap_forward`, `replace` and `state`.

        Raises:
            AttachError: the network lacks what the mechanism needs.
        """

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return what the mechanism did on one target, as plain values; it is merged into `Attachment.report()`."""
        return {}

    def needs_step(self, attachment: Attachment, step: StepContext) -> bool:
        """Return whether a step must be computed, because the mechanism refreshes at it what it keeps; caches ask."""
        return False

    def attach(self, target: Any) -> Attachment:
        """Attach to a network, or to all networks of a pipeline that denoise.

        Args:
            target: a transformer, wrapped or not, or a pipeline.

        Returns:
            The attachment; also a context manager that detaches at its end.

        Raises:
            AttachError: nothing to attach to, or another mechanism on the network forbids it.
        """
        return Attachment(self, target)


class Attachment:
    """A mechanism on a network.

    Args:
        mechanism: what to attach.
        target: a transformer, wrapped or not, or a pipeline.

    Attributes:
        models: the networks by component name ("transformer" for a single one), as they are called.
        state: tensors kept between calls, shared by all mechanisms on the network.
        calls: how often the mechanism's functions were called.
        inactive: why it did nothing, and how often; see `skip`.

    Raises:
        AttachError: see `Mechanism.attach`.
        TypeError: the mechanism's stage or what it excludes is not of the enumerations.
    """

    def __init__(self, mechanism: Mechanism, target: Any) -> None:
        _check_declaration(mechanism)
        self.mechanism = mechanism
        self.target = target
        self.models = find_networks(target, mechanism.components)
        self.state = StateStore()
        self.calls = 0
        self.inactive: Counter[str] = Counter()
        self._hooks = 0
        self._replaced: list[tuple[Any, str, Any]] = []
        self._undo: ExitStack | None = None
        self._last_report: dict[str, Any] | None = None
        self._attached = False
        self._arrival = next(_ARRIVALS)
        self._attach()

    # ------------------------------------------------------------- tools for install()

    def layers(self, *kinds: str) -> list[AttentionLayer]:
        """Return the attention layers of all networks, in the order of execution.

        Args:
            *kinds: which ("self", "joint", "cross", "text", "unknown"); none means all.

        Raises:
            AttachError: there is none.
        """
        from dit.runtime.families import family_of

        found: list[AttentionLayer] = []
        for component, model in self.models.items():
            prefix = "" if component == "transformer" else f"{component}."  # two networks may share names
            layers = family_of(model).attention_layers(model)
            found += [replace(layer, name=prefix + layer.name) for layer in layers if not kinds or layer.kind in kinds]
        if not found:
            wanted = " or ".join(kinds) or "any"
            raise AttachError(f"{self._title()}: no attention layer of kind {wanted} in {self._models_title()}")
        return found

    def pre_hook(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Call `function(module, args, kwargs)` before each call of a module.

        It returns None, or the pair (args, kwargs) to use instead.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            self.calls += 1
            return function(module, args, kwargs)

        self.on_detach(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def post_hook(self, module: nn.Module, function: Callable[..., Any], always: bool = False) -> None:
        """Call `function(module, args, kwargs, output)` after each call of a module.

        Args:
            module: where.
            function: returns None, or what replaces the output.
            always: also after a call that raised; then the output is None.
        """

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            self.calls += 1
            return function(module, args, kwargs, output)

        self.on_detach(module.register_forward_hook(hook, with_kwargs=True, always_call=always).remove)

    def wrap_forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Replace a module's `forward` by `function(forward, *args, **kwargs)`, which may leave the call out.

        Where accelerate offloads the module, this goes below accelerate's own wrapper: pipelines take that off and put
        it back after each call, and would lose what lies above it.
        """
        inner = getattr(module, _forward_slot(module))

        @wraps(inner)  # modular pipelines of diffusers pass what its signature names
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(inner, *args, **kwargs)

        own = _own(module, _forward_slot(module))
        if own is _MISSING or own == type(module).forward.__get__(module):  # accelerate keeps the class's own
            own = _MISSING
        setattr(module, _forward_slot(module), forward)
        self._replaced.append((module, "forward", forward))
        self.on_detach(partial(_restore_forward, module, own))

    def replace(self, thing: Any, attribute: str, value: Any) -> None:
        """Set an attribute until `detach()`, which gives back the old one, or none where there was none."""
        old = _own(thing, attribute)
        setattr(thing, attribute, value)

        def restore() -> None:
            if old is _MISSING:
                delattr(thing, attribute)
            else:
                setattr(thing, attribute, old)

        self._replaced.append((thing, attribute, value))
        self.on_detach(restore)

    def on_detach(self, function: Callable[[], object]) -> None:
        """Call `function()` when the mechanism leaves; the last one given is the first called."""
        if self._undo is None:
            raise AttachError(f"{self._title()}: hooks can be set in install() only")
        self._hooks += 1
        self._undo.callback(function)

    def skip(self, reason: str) -> None:
        """Count a call in which the mechanism did nothing, by its reason."""
        self.inactive[reason] += 1

    # ------------------------------------------------------------------------ lifecycle

    @property
    def is_attached(self) -> bool:
        """Whether the mechanism is on its network."""
        return self._attached

    def detach(self) -> None:
        """Take the mechanism off: the network computes the same bits as before. A second call does nothing.

        Raises:
            AttachError: somebody else wrapped what the mechanism replaced. It stays attached; undo that and try again.
        """
        if not self._attached:
            return
        last_report = self.report()
        above = [other for other in self._others() if other._rank() > self._rank()]
        try:
            _remove_all(above)
            self._uninstall()
            self._attached = False
            for model in self._networks():
                stack = vars(model)[_ATTACHMENTS]
                stack.remove(self)
                if not stack:
                    delattr(model, _ATTACHMENTS)
        finally:
            _reinstall(above)
        self._last_report = {**last_report, "attached": False}
        self.state.drop(self.mechanism.name)

    def report(self) -> dict[str, Any]:
        """Return what the mechanism is on, what it did and why it did nothing, as plain values.

        After `detach()` it is the report of that moment.
        """
        if self._last_report is not None:
            return self._last_report
        return {
            "mechanism": self.mechanism.name,
            "attached": self._attached,
            "networks": {name: type(unwrap(model)).__name__ for name, model in self.models.items()},
            "hooks": self._hooks,
            "calls": self.calls,
            "inactive": dict(self.inactive),
            "state_bytes": self.state.nbytes(self.mechanism.name),
            "other_mechanisms": [other.mechanism.name for other in self._others()],
            **self.mechanism.report(self),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # ------------------------------------------------------------------------ the stack

    def _attach(self) -> None:
        others = self._others()
        self._check(others)
        if others:
            self.state = others[0].state
        above = [other for other in others if other.mechanism.stage > self.mechanism.stage]
        try:
            _remove_all(above)
            self._install()
            if not self._hooks:
                self._uninstall()
                raise AttachError(f"{self._title()}: found nothing to attach to in {self._models_title()}")
            for model in self._networks():
                vars(model).setdefault(_ATTACHMENTS, []).append(self)
                vars(model)[_ATTACHMENTS].sort(key=Attachment._rank)
            self._attached = True
        finally:
            _reinstall(above)

    def _check(self, others: list[Attachment]) -> None:
        for other in others:
            if other.mechanism.name == self.mechanism.name:
                raise AttachError(
                    f"{self._title()}: {self._models_title()} already has a mechanism of this name; detach it first"
                )
            shared = self.mechanism.exclusive & other.mechanism.exclusive
            if shared:
                raise AttachError(
                    f"{self._title()} and {other._title()} both need {', '.join(sorted(shared))} for themselves; "
                    "detach one of them"
                )

    def _install(self) -> None:
        self._hooks, self._replaced, self._undo = 0, [], ExitStack()
        try:
            self.mechanism.install(self)
        except BaseException:
            self._uninstall()
            raise
        self._recompile()

    def _uninstall(self) -> None:
        for thing, attribute, value in self._last_replaced():
            if _own(thing, _forward_slot(thing) if attribute == "forward" else attribute) is not value:
                raise AttachError(
                    f"{self._title()}: someone else replaced {type(thing).__name__}.{attribute} meanwhile; undo that "
                    "first, then try again"
                )
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()
            self._recompile()

    def _recompile(self) -> None:
        """Make compiled networks compile anew: compiled code keeps the hooks that it was compiled with.

        The reset is of the whole process: torch keeps compiled code by function, which all networks of a class share,
        and has no public way to forget that of one. Other compiled networks lose time by it, never correctness.
        """
        if any(_is_compiled(model) for model in self.models.values()):
            torch.compiler.reset()

    def _last_replaced(self) -> list[tuple[Any, str, Any]]:
        """Return what was replaced; of a thing that was replaced twice, the last value."""
        return list({(id(thing), name): (thing, name, value) for thing, name, value in self._replaced}.values())

    def _networks(self) -> list[nn.Module]:
        return [unwrap(model) for model in self.models.values()]

    def _others(self) -> list[Attachment]:
        """Return the other attachments on the same networks, lowest first."""
        stacks = [vars(model).get(_ATTACHMENTS, ()) for model in self._networks()]
        return sorted({other for stack in stacks for other in stack if other is not self}, key=Attachment._rank)

    def _rank(self) -> tuple[int, int]:
        return self.mechanism.stage, self._arrival

    def _title(self) -> str:
        return f"mechanism {self.mechanism.name!r}"

    def _models_title(self) -> str:
        return ", ".join(type(unwrap(model)).__name__ for model in self.models.values())


def find_networks(target: Any, components: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return the networks of a target by component name, by default those that denoise.

    Args:
        target: a module, or a pipeline with a dict `components`.
        components: names of the pipeline's components, for example `("text_encoder", "vae")`; None means those called
            transformer, transformer_2, ...

    Returns:
        {"transformer": module} for a module; for a pipeline its components by name.

    Raises:
        AttachError: there is none, or one that was named is not there or no network.
    """
    if isinstance(target, nn.Module) and components is None:
        return {"transformer": target}
    parts = {} if isinstance(target, nn.Module) else getattr(target, "components", {})
    names = [name for name in parts if name.startswith("transformer")] if components is None else components
    found = {name: part for name in names if isinstance(part := parts.get(name), nn.Module)}
    missing = [name for name in components or () if name not in found]
    if not found or missing:
        wanted = "a transformer, or a pipeline with a component called 'transformer'"
        if components is not None:
            wanted = f"a pipeline with the networks {', '.join(missing) or '(none were named)'}"
        networks = ", ".join(name for name, part in parts.items() if isinstance(part, nn.Module)) or "none"
        raise AttachError(f"cannot attach to {type(target).__name__}: expected {wanted} (its networks: {networks})")
    return found


def attachments(target: Any, components: Sequence[str] | None = None) -> list[Attachment]:
    """Return what is attached to a network or pipeline, lowest stage first.

    Args:
        target: as in `Mechanism.attach`.
        components: which networks of a pipeline, see `find_networks`.
    """
    stacks = [vars(unwrap(model)).get(_ATTACHMENTS, ()) for model in find_networks(target, components).values()]
    return list(dict.fromkeys(attachment for stack in stacks for attachment in stack))


def _check_declaration(mechanism: Mechanism) -> None:
    """Refuse a stage or an exclusion that is misspelt: it would silently mean another order, or exclude nothing."""
    title = f"mechanism {mechanism.name!r}"
    if hasattr(mechanism, "order"):
        raise TypeError(f"{title} has an order; say `stage`, one of {', '.join(map(str, Stage.__members__))}")
    if not isinstance(mechanism.stage, Stage):
        raise TypeError(f"{title}: stage is {mechanism.stage!r}; use one of Stage.{', '.join(Stage.__members__)}")
    wrong = [one for one in mechanism.exclusive if not isinstance(one, Resource)]
    if wrong:
        raise TypeError(f"{title}: exclusive names {wrong}; use members of Resource: {', '.join(Resource.__members__)}")


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None or "_orig_mod" in module._modules for module in model.modules())


def _remove_all(above: list[Attachment]) -> None:
    for attachment in reversed(above):
        attachment._uninstall()


def _reinstall(above: list[Attachment]) -> None:
    for attachment in above:
        if attachment._undo is None:
            attachment._install()


def _forward_slot(module: Any) -> str:
    """Return the attribute that holds a module's forward; accelerate moves it aside while it offloads the module."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _restore_forward(module: nn.Module, own: Any) -> None:
    """Give a module its forward back: one that it had itself, or that of its class."""
    slot = _forward_slot(module)
    if own is not _MISSING:
        setattr(module, slot, own)
    elif slot == "forward":
        del module.forward
    else:
        setattr(module, slot, type(module).forward.__get__(module))


def _own(thing: Any, attribute: str) -> Any:
    """Return what an instance itself holds under a name; a module's parts count as its own."""
    namespaces = [vars(thing)]
    if isinstance(thing, nn.Module):
        namespaces += [thing._modules, thing._parameters, thing._buffers]
    return next((names[attribute] for names in namespaces if attribute in names), _MISSING)
