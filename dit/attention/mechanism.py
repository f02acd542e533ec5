"""PlannedAttention: the mechanism that has the attention layers of a network follow a plan.

Each layer gets a backend of its own in diffusers' registry, which knows the layer, so that nothing has to be counted or
looked up by name, and `torch.compile(fullgraph=True)` sees one operator, `tessera::planned_attention`. Processors that
call `F.scaled_dot_product_attention` themselves are replaced by copies that ask (`processors`); what can't be replaced
is intercepted while the layer computes. Dense calls are those that the layer makes without a plan, to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit.attention.call_notes import CallNote
from dit.attention.choices import Plan
from dit.attention.functional import attention
from dit.attention.inputs import Inputs
from dit.attention.kernels.native import attend_native
from dit.attention.map_cache import MapCache
from dit.attention.planned_layer import PlannedLayer
from dit.attention.processors import DISPATCH, SDPA, asking, attends_itself, mentions
from dit.runtime.diffusers_compat import register_attention_backend, unregister_attention_backend
from dit.runtime.families import AttentionLayer, family_of
from dit.runtime.hooks import AttachError, Attachment, Mechanism
from dit.runtime.stages import Resource, Stage
from dit.runtime.state import unwrap
from dit.runtime.step_context import StepContext, current_step, step_scope

KINDS = ("self", "joint", "unknown")
"""Layers that a plan is for: those in which image tokens look at each other."""

PREFIX = "tessera_plan_"
"""Of the names of backends; a number follows."""

_NUMBERS = count()
_LAYERS: WeakValueDictionary[int, PlannedLayer] = WeakValueDictionary()


class PlannedAttention(Mechanism):
    """Have the attention layers among image tokens compute what a plan says.

    Args:
        plan: see `dit.attention.plan.AttentionPlan`.
        any_weights: accept other weights of the architecture that the plan was made for.
        measure_error: queries of each sparse call that are compared with dense attention; 0 measures nothing.
    """

    name = "planned_attention"
    stage = Stage.ATTENTION
    exclusive = frozenset({Resource.ATTENTION_OUTPUT})
    layer_type: ClassVar[type[PlannedLayer]] = PlannedLayer

    def __init__(self, plan: Plan, *, any_weights: bool = False, measure_error: int = 0) -> None:
        if measure_error < 0:
            raise ValueError(f"measure_error is {measure_error}; use a number of queries, or 0 to measure nothing")
        self.plan, self.any_weights, self.measure_error = plan, any_weights, measure_error
        self.maps = MapCache(plan)
        self.layers: list[PlannedLayer] = []
        self.unreached: list[str] = []

    def install(self, attachment: Attachment) -> None:
        """Give each layer its backend, and note the calls of the networks."""
        before, self.layers, self.unreached = self.layers, [], []
        owners = {id(part): name for name, model in attachment.models.items() for part in model.modules()}
        found = attachment.layers(*KINDS)
        for component, model in attachment.models.items():
            bare = unwrap(model)
            self.plan.check_model(bare, self.any_weights)
            layers = [one for one in found if owners[id(one.module)] == component]
            self.plan.check_layers(len(layers))
            note = CallNote(bare, family_of(bare))
            attachment.on_detach(bare.register_forward_pre_hook(partial(_enter, note), with_kwargs=True).remove)
            for index, layer in enumerate(layers):
                self._take(attachment, note, layer, index, len(layers))
        if not self.layers:
            raise AttachError(
                f"no layer of {', '.join(self.unreached) or 'the network'} computes softmax attention that a plan "
                "could replace"
            )
        for old, new in zip(before, self.layers, strict=False):  # installed again under another mechanism
            new.statistics, new.heads = old.statistics, old.heads

    def report(self, attachment: Attachment) -> dict[str, Any]:
        """Return, in all and by layer: calls, why some were dense, densities, kernels, seconds, errors."""
        layers = {one.name: one.statistics.report() for one in self.layers}
        reasons: Counter[str] = Counter()
        for one in layers.values():
            reasons.update(one["reasons"])
        weights = [one.statistics.weight for one in self.layers]
        return {
            "sparse": sum(one["sparse"] for one in layers.values()),
            "dense": sum(one["dense"] for one in layers.values()),
            "dense_reasons": dict(reasons),
            "density": _mean([one["density"] for one in layers.values()], weights),
            "token_density": _mean([one["token_density"] for one in layers.values()], weights),
            "error": _mean([one["error"] for one in layers.values()], weights),
            "seconds": {name: sum(one["seconds"][name] for one in layers.values()) for name in ("sparse", "dense")},
            "maps": len(self.maps),
            "unreached": list(self.unreached),
            "layers": layers,
        }

    def needs_step(self, attachment: Attachment, step: StepContext) -> bool:
        """Return whether a correction refreshes at a step."""
        return any(layer.refreshes(step) for layer in self.layers)

    # ------------------------------------------------------------------------ attaching

    def _take(self, attachment: Attachment, note: CallNote, layer: AttentionLayer, index: int, total: int) -> None:
        """Have one layer follow the plan."""
        owner: Any = layer.module
        processor: Any = getattr(owner, "processor", None)
        asks = hasattr(processor, "_attention_backend")
        if not asks and not attends_itself(processor) and not mentions(processor or owner, SDPA, DISPATCH):
            self.unreached.append(layer.name)
            return
        dense = _dense_of(processor, processor._attention_backend) if asks else attend_native
        planned = self.layer_type(
            next(_NUMBERS), layer.name, index, total, layer.kind, layer.axes, self.plan, note, self.maps,
            attachment.state, self.name, dense, self.measure_error,
        )  # fmt: skip
        _LAYERS[planned.number] = planned
        self.layers.append(planned)
        attend = _backend_of(planned)
        if asks:
            name = f"{PREFIX}{planned.number}"
            member = register_attention_backend(name, attend, is_listed=False)
            attachment.on_detach(partial(unregister_attention_backend, name))
            attachment.replace(processor, "_attention_backend", member)
        elif attends_itself(processor):
            attachment.replace(owner, "processor", asking(processor, attend))
        else:
            attachment.wrap_forward(owner, partial(_intercepted, attend))


def _enter(note: CallNote, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    note.enter(args, kwargs)


def _dense_of(processor: Any, backend: Any) -> Callable[..., Tensor]:
    """Return the attention of a processor that asks for its backend."""
    if type(processor).__module__.startswith("dit."):

        def own(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool,
            scale: float | None, enable_gqa: bool,
        ) -> Tensor:  # fmt: skip
            return attention(query, key, value, attn_mask, scale=scale, backend=backend)

        return own

    def dispatched(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool,
        scale: float | None, enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend
        )

    return dispatched


def _backend_of(layer: PlannedLayer) -> Callable[..., Tensor]:
    """Return the function that diffusers' dispatcher calls for a layer."""
    number, ticket = layer.number, layer.note.ticket

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if _parallel_config is not None:
            raise AttachError("an attention plan needs whole sequences, and context parallelism divides them")
        if torch.compiler.is_compiling():
            return torch.ops.tessera.planned_attention(
                query, key, value, attn_mask, ticket, number, dropout_p, is_causal, scale, enable_gqa
            )
        return layer(Inputs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))

    return attend


class _Interception(TorchFunctionMode):
    """Replace `F.scaled_dot_product_attention` while a layer computes."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        for name in names[:3]:
            given[name] = given[name].transpose(1, 2)  # (B, N, K, E)
        return self.attend(**given).transpose(1, 2)  # (B, K, N, E)


def _intercepted(attend: Callable[..., Tensor], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Interception(attend):
        return forward(*args, **kwargs)


def _mean(values: list[float | None], weights: list[float]) -> float | None:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


@torch.library.custom_op("tessera::planned_attention", mutates_args=())
def _planned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    ticket: Tensor,
    layer: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    out = _layer(layer)(Inputs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))
    return out.contiguous()


@_planned_attention.register_fake
def _planned_attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


@torch.library.custom_op("tessera::planned_attention_backward", mutates_args=())
def _planned_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    layer: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    owner = _layer(layer)
    here = current_step() or owner.last_step  # the backward pass may lie outside of the step's scope
    with step_scope(here), _recording():
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
        statistics, owner.statistics = owner.statistics, type(owner.statistics)()
        try:
            out = owner(Inputs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa))
        finally:
            owner.statistics = statistics
        first, second, third = torch.autograd.grad(out, (query, key, value), gradient)
    return first.contiguous(), second.contiguous(), third.contiguous()


@_planned_attention_backward.register_fake
def _planned_attention_backward_fake(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    return first, second, third


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, attn_mask, _, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, attn_mask)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    query, key, value, attn_mask = ctx.saved_tensors
    operator: Any = torch.ops.tessera.planned_attention_backward
    gradients = operator(gradient, query, key, value, attn_mask, *ctx.rest)
    return (*gradients, *(None,) * 7)


_planned_attention.register_autograd(_backward, setup_context=_setup_context)


class _recording:  # noqa: N801
    """Record gradients inside of an operator, where torch doesn't."""

    def __enter__(self) -> None:
        self._keys = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        self._keys.__enter__()
        self._grad = torch.enable_grad()
        self._grad.__enter__()

    def __exit__(self, *_: Any) -> None:
        self._grad.__exit__(None, None, None)
        self._keys.__exit__(None, None, None)


def _layer(number: int) -> PlannedLayer:
    layer = _LAYERS.get(number)
    if layer is None:
        raise AttachError("this compiled code belongs to an attention plan that is detached: compile the network anew")
    return layer
