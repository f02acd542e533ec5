"""Regions whose output is forecast: the network's output, the stack of its blocks, or modules by name."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, get_args

import torch
from torch import Tensor, nn

from dit.runtime.families import family_of
from dit.runtime.hooks import AttachError, Attachment
from dit.runtime.state import named_layers, unwrap
from sampling.step_cache.call import Cache, Call
from sampling.step_cache.profile import RegionName
from sampling.step_cache.stack import Stack
from sampling.step_cache.values import Values, flatten, match_latents

Forward = Callable[..., Any]


class InstalledRegion(Protocol):
    """A region installed in one network."""

    def run(self, call: Call, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the network's output, computed or forecast; `call` must be decided in the course of it."""
        ...


class Region(ABC):
    """A part of a network.

    Attributes:
        needs_latents: whether calls must bring their latents as the signal.
    """

    needs_latents: bool = False

    @abstractmethod
    def install(self, cache: Cache, attachment: Attachment, component: str, model: nn.Module) -> InstalledRegion:
        """Find the region in a network and hook into it.

        Raises:
            AttachError: it is not there, or the gate needs another region.
        """


@dataclass(frozen=True)
class Output(Region):
    """The network's output: a forecast step does not call the network at all.

    It needs nothing of the network, so quantized, compiled, sharded ones are all the same, and keeps latents only.

    Args:
        minus_input: forecast the difference to the latents that came in, as EasyCache does.
    """

    minus_input: bool = False

    @property
    def needs_latents(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the difference to them is forecast."""
        return self.minus_input

    def install(self, cache: Cache, attachment: Attachment, component: str, model: nn.Module) -> InstalledRegion:
        """Check that the gate does not observe blocks; nothing is hooked."""
        if cache.gate.signal in ("head", "modulated"):
            raise AttachError(
                f"the gate {type(cache.gate).__name__} looks into the first blocks, which Output() does not run on "
                "forecast steps; use the region Blocks()"
            )
        cache.set_residual_cost(component, 0.0)
        return _InstalledOutput(self.minus_input)


@dataclass(frozen=True)
class _InstalledOutput:
    minus_input: bool

    def run(self, call: Call, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not call.decide(call.signal):
            return call.forecast("output", self._base(call, call.newest("output")))
        output = forward(*args, **kwargs)
        call.keep("output", output, self._base(call, flatten(output)[0]))
        return output

    def _base(self, call: Call, tensors: Values) -> Values | None:
        return match_latents(call.signal, tensors) if self.minus_input and isinstance(call.signal, Tensor) else None


@dataclass(frozen=True)
class Blocks(Region):
    """The blocks between the first `head` and the last `tail` ones; what they add to the streams is forecast.

    Args:
        head: blocks at the beginning that always run.
        tail: blocks at the end that always run.
        verify: compare the output of the tail with its own forecast (`memory["error"]`), for `Speculative`.
    """

    head: int = 1
    tail: int = 0
    verify: bool = False

    def __post_init__(self) -> None:
        if self.head < 0 or self.tail < 0 or (self.verify and self.tail < 1):
            raise ValueError(
                f"need head >= 0 and tail >= 0 (>= 1 to verify), got {self.head}, {self.tail}, verify={self.verify}"
            )

    def install(self, cache: Cache, attachment: Attachment, component: str, model: nn.Module) -> InstalledRegion:
        """Wrap the blocks."""
        family = family_of(model)
        blocks = family.blocks(model, refiners=False)
        if len(blocks) <= self.head + self.tail:
            raise AttachError(
                f"{type(unwrap(model)).__name__} has {len(blocks)} blocks, too few for head={self.head} and "
                f"tail={self.tail}: at least one must lie between"
            )
        if cache.gate.signal == "head" and self.head < 1:
            raise AttachError(f"the gate {type(cache.gate).__name__} looks at the head blocks: use Blocks(head=1)")
        cache.set_residual_cost(component, (self.head + self.tail) / len(blocks))
        attention = None
        if cache.gate.signal == "modulated":
            if self.head:
                raise AttachError(f"the gate {type(cache.gate).__name__} decides in the first block: use head=0")
            attention = _first_attention(model, blocks[0][0])
        return Stack(attachment, [block for _, block in blocks], self.head, self.tail, attention, self.verify)


def _first_attention(model: nn.Module, block: str) -> nn.Module:
    layers = family_of(model).attention_layers(model)
    for layer in layers:
        if layer.name.startswith(block + "."):
            return layer.module
    raise AttachError(f"{type(unwrap(model)).__name__}: no attention layer in {block}, whose input the gate looks at")


@dataclass(frozen=True)
class Modules(Region):
    """Modules by name; each one's output is forecast by itself, as TaylorSeer does with attention and feed-forward.

    Args:
        patterns: regular expressions that whole normalised names match; None means all attention layers of the blocks
            and their feed-forward layers.

    Raises:
        AttachError: (on attaching) nothing matches.
    """

    patterns: tuple[str, ...] | None = None

    def install(self, cache: Cache, attachment: Attachment, component: str, model: nn.Module) -> InstalledRegion:
        """Wrap the modules."""
        if cache.gate.signal in ("head", "modulated"):
            raise AttachError(f"the gate {type(cache.gate).__name__} needs the region Blocks(), not Modules()")
        found = self._find(model)
        installed = _InstalledModules()
        for name, module in found.items():
            installed.wrap(attachment, name, module)
        weights = sum(parameter.numel() for parameter in unwrap(model).parameters())
        inside = sum(parameter.numel() for module in found.values() for parameter in module.parameters())
        cache.set_residual_cost(component, 1.0 - inside / max(weights, 1))
        return installed

    def _find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the outermost modules that match."""
        bare = unwrap(model)
        named = dict(named_layers(bare))
        patterns = self.patterns if self.patterns is not None else self._usual(model)
        found = {name: part for name, part in named.items() if any(re.fullmatch(p, name) for p in patterns)}
        if not found:
            near = difflib.get_close_matches(re.sub(r"[\\^$*+()]", "", patterns[0]), list(named), n=3, cutoff=0.3)
            raise AttachError(
                f"no module of {type(bare).__name__} matches {' or '.join(patterns)} as a whole name; names near it: "
                f"{', '.join(near) or ', '.join(list(named)[:3])}"
            )
        inner = {name for name in found for other in found if name.startswith(other + ".")}
        return {name: part for name, part in found.items() if name not in inner}

    @staticmethod
    def _usual(model: nn.Module) -> tuple[str, ...]:
        family = family_of(model)
        attention = tuple(re.escape(layer.name) for layer in family.attention_layers(model))
        blocks = tuple(re.escape(name) for name, _ in family.blocks(model, refiners=False))
        return (*attention, *(rf"{block}\.(ff|ffn|mlp|feed_forward)(_context)?" for block in blocks))


class _InstalledModules:
    """Wrapped modules that read the running call."""

    def __init__(self) -> None:
        self.call: Call | None = None

    def wrap(self, attachment: Attachment, name: str, module: nn.Module) -> None:
        # never part of a graph, which would hold the decision of a step and be compiled anew at each
        attachment.wrap_forward(module, torch.compiler.disable(partial(self._around, name)))

    def run(self, call: Call, forward: Forward, args: tuple, kwargs: dict[str, Any]) -> Any:
        call.decide(call.signal)
        self.call = call
        try:
            return forward(*args, **kwargs)
        finally:
            self.call = None

    def _around(self, name: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = self.call
        if call is None:
            return forward(*args, **kwargs)
        if not call.computed:
            return call.forecast(name)
        output = forward(*args, **kwargs)
        call.keep(name, output)
        return output


def region_of(name: str) -> Region:
    """Return the region that a profile was, or is to be, calibrated for.

    Args:
        name: "output" or "blocks".

    Raises:
        ValueError: another name.
    """
    regions: dict[str, Region] = {"output": Output(), "blocks": Blocks(head=0)}
    if name not in regions:
        raise ValueError(f"region {name!r} is not known; use one of {', '.join(get_args(RegionName))}")
    return regions[name]


__all__ = ["Blocks", "InstalledRegion", "Modules", "Output", "Region", "RegionName", "region_of"]
