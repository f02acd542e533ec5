"""What really happens in a run of a tiny pipeline: calls of the transformer, and products in its attention layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import diffusers
import torch.nn.functional as F
from torch import Tensor, nn

from dit.runtime.families import Family, TokenLayout, family_of
from tests.families.tiny import tiny_call, tiny_pipeline

Lengths = tuple[int, int, int]
"""Batch, queries, keys."""


@dataclass
class Call:
    """One call of the transformer.

    Attributes:
        inputs: its named inputs.
        layout: the tokens as the row computes them.
        latents: the noisy latents, batch first.
        lengths: attention layer -> what it computed, in the order of execution.
        values: the values of the first joint product, (B, K, N, E), once for each product of that layer.
    """

    inputs: dict[str, Any]
    layout: TokenLayout
    latents: Tensor
    lengths: dict[str, list[Lengths]] = field(default_factory=dict)
    values: list[Tensor] = field(default_factory=list)


class Recorder:
    """Watches a transformer during a run."""

    def __init__(self, row: Family, model: nn.Module) -> None:
        self.row, self.model = row, model
        self.calls: list[Call] = []
        layers = row.attention_layers(model)
        self.layers = {layer.module: layer.name for layer in layers}
        self.first_joint = next((layer.name for layer in layers if layer.kind == "joint"), None)
        self.inside: str | None = None
        self.projected: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator["Recorder"]:
        """Record until the end of the block."""
        handles = [self.model.register_forward_pre_hook(self._on_call, with_kwargs=True)]
        for module in self.layers:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave))
            for name in ("to_q", "to_k"):
                if hasattr(module, name):
                    handles.append(getattr(module, name).register_forward_hook(self._keep(name)))
        real = F.scaled_dot_product_attention
        with mock.patch.object(F, "scaled_dot_product_attention", lambda *a, **k: self._product(real, *a, **k)):
            yield self
        for handle in handles:
            handle.remove()

    def _on_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = self.row.bind(model, args, kwargs)
        self.calls.append(Call(inputs, self.row.token_grid(model, inputs), self.row.latents(inputs)))

    def _enter(self, module: nn.Module, *_: object) -> None:
        self.inside = self.layers[module]

    def _leave(self, module: nn.Module, *_: object) -> None:
        noted = self.calls[-1].lengths.setdefault(self.layers[module], [])
        if not noted:  # linear attention has no product of queries and keys
            queries, keys = self.projected["to_q"], self.projected["to_k"]
            noted.append((len(queries), queries.shape[1], keys.shape[1]))
        self.inside = None

    def _keep(self, name: str) -> Any:
        return lambda module, inputs, output: self.projected.__setitem__(name, output)

    def _product(self, real: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.inside is not None:
            call = self.calls[-1]
            call.lengths.setdefault(self.inside, []).append((len(query), query.shape[-2], key.shape[-2]))
            if self.inside == self.first_joint:
                call.values.append(value.clone())
        return real(query, key, value, *args, **kwargs)


def record(name: str, guided: bool = True, **overrides: Any) -> tuple[diffusers.DiffusionPipeline, list[Call]]:
    """Generate with a tiny pipeline; return it with the calls that its transformer saw.

    Args:
        name: see `tiny_pipeline`.
        guided: whether the second branch is on, where the pipeline has one.
        **overrides: arguments of the call.
    """
    pipe = tiny_pipeline(name)
    row = family_of(pipe.transformer)
    default_options = row.pipeline(pipe)
    arguments = tiny_call(name)
    if default_options.guidance_argument is not None:
        arguments[default_options.guidance_argument] = 3.0 if guided else default_options.guidance_off
    with Recorder(row, pipe.transformer).watching() as recorder:
        pipe(**{**arguments, **overrides})
    return pipe, recorder.calls


@cache
def recorded(name: str, guided: bool = True) -> tuple[diffusers.DiffusionPipeline, list[Call]]:
    """`record`, once for all tests that only look."""
    return record(name, guided)
