"""The attention layer that is computing: its position in the network, as `StepContext` is the position in the run.

Kernels get query, key and value and nothing else, also those that diffusers' networks call through its dispatcher. A
kernel that treats layers or heads differently reads `current_layer()`. The mechanism that brings such a kernel asks for
it with `follow_layers` in its `install`; where nobody asks, no module is touched and nothing is computed.

`torch.compile` can't look into a ContextVar: it breaks its graph at each attention layer that is followed, and refuses
where `fullgraph=True`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from dit.runtime.families.tokens import Axes, Kind
    from dit.runtime.hooks import Attachment


@dataclass(frozen=True, slots=True)
class LayerContext:
    """The attention layer that is computing.

    Args:
        index: position among the layers of the same kind of its network, in the order of execution, from 0.
        count: how many layers of this kind the network has.
        name: normalised name; in a pipeline with several networks it begins with the component's.
        kind: what attends to what, one of `dit.runtime.families.tokens.Kind`.
        axes: what axes of the grid one sequence runs over.
        heads: which of the layer's heads the query, key and value of this call are; None means all.
    """

    index: int
    count: int
    name: str
    kind: Kind
    axes: Axes = "thw"
    heads: range | None = None


_CURRENT: ContextVar[LayerContext | None] = ContextVar("attention_layer", default=None)


def current_layer() -> LayerContext | None:
    """Return the attention layer that is computing; None outside of them, and where nobody asked to follow them."""
    return _CURRENT.get()


@contextmanager
def layer_scope(layer: LayerContext | None) -> Iterator[None]:
    """Set the layer of all attention calls made inside the `with` block.

    Args:
        layer: the layer of the calls; None for calls outside of the layers.
    """
    token = _CURRENT.set(layer)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def head_scope(heads: range) -> Iterator[None]:
    """Say that the attention calls inside the `with` block compute a part of the current layer's heads.

    Args:
        heads: their indices in the layer. Without a current layer nothing is set.
    """
    layer = _CURRENT.get()
    if layer is None:
        yield
        return
    with layer_scope(replace(layer, heads=heads)):
        yield


def follow_layers(attachment: Attachment, *kinds: Kind) -> list[LayerContext]:
    """Have the attention layers of an attachment's networks set `current_layer()` while they compute.

    To be called in `Mechanism.install`; it ends when the mechanism leaves.

    Args:
        attachment: of the mechanism that asks.
        *kinds: which layers; none means all.

    Returns:
        The layers as they will be seen, in the order of execution.

    Raises:
        AttachError: there is none.
    """
    layers = attachment.layers(*kinds)
    owners = {id(part): name for name, model in attachment.models.items() for part in model.modules()}
    groups: list[tuple[str, Kind]] = [(owners[id(layer.module)], layer.kind) for layer in layers]
    counts, seen = Counter(groups), Counter[tuple[str, str]]()
    contexts = []
    for layer, group in zip(layers, groups, strict=True):
        context = LayerContext(seen[group], counts[group], layer.name, layer.kind, layer.axes)
        seen[group] += 1
        attachment.wrap_forward(layer.module, partial(_inside, context))
        contexts.append(context)
    return contexts


def _inside(context: LayerContext, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a layer's forward with its context set."""
    with layer_scope(context):
        return forward(*args, **kwargs)
