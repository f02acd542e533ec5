"""What a replacement of attention is: a processor that adds its weights to the layer it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from dit.attention.grid import TokenGrid
from dit.layers.attention import Projections, SelfAttention, SelfAttnProcessor, apply_rotary_qk
from dit.layers.frame_memory import LayerMemory
from dit.layers.positions import Rotary
from dit.runtime.state import named_layers, unwrap

REPLACEMENTS: dict[str, str] = {
    "agent": "agent",
    "agent_free": "agent",
    "mala": "mala",
    "moh": "moh",
    "dma": "dma",
    "coarse_gate": "coarse_gate",
    "sla": "sla",
    "sla2": "sla2",
}
"""Replacement -> the file of this folder that registers it."""

_TABLE: dict[str, type[Replacement]] = {}

Kind = TypeVar("Kind", bound="Replacement")


class Replacement(Projections, ABC):
    """A way to attend in place of dense attention. Subclasses are dataclasses of their parameters.

    Those that attend by softmax over tokens are `AttnProcessor` too, so that attention backends and plans reach them.

    Attributes:
        name: as `replace_attention` takes it.
        paper: where it was published.
        takes_grid: layers hand it the grid of their tokens.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    takes_grid: ClassVar[bool] = True

    def new_weights(self, attn: SelfAttention) -> dict[str, nn.Module | nn.Parameter]:
        """Return the weights that the layer gets, by the names of the published code."""
        return {}

    @abstractmethod
    def mix(
        self,
        attn: Any,
        hidden_states: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        rotary: Rotary | None,
        key_mask: Tensor | None,
        grid: TokenGrid,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the layer, with the weights of `new_weights`.
            hidden_states: (B, N, D).
            qkv: queries, keys and values, (B, N, K, E) each, before rotary embeddings.
            rotary: (cos, sin), each (N, E).
            key_mask: bool, (B, N), False for tokens that nobody may look at.
            grid: the tokens.

        Returns:
            (B, N, K, E).
        """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        memory: LayerMemory | None = None,
        grid: TokenGrid | None = None,
    ) -> Tensor:
        """Attend among all tokens.

        Args:
            attn: the layer that owns the projections.
            hidden_states: (B, N, D).
            attention_mask: bool, (B, N), True for tokens that may be attended to.
            image_rotary_emb: (cos, sin), each (N, E).
            memory: must be None.
            grid: the tokens; None means a row of visual ones.

        Returns:
            (B, N, D).

        Raises:
            ValueError: a mask of pairs, a memory, or a grid of another length.
        """
        if memory is not None or (attention_mask is not None and attention_mask.ndim != 2):
            what = "a memory of frames" if memory is not None else "a mask of pairs"
            raise ValueError(f"attention {self.name!r} takes no {what}; use attention='dense' for causal networks")
        length = hidden_states.shape[1]
        grid = TokenGrid(1, 1, length) if grid is None else grid
        if grid.length != length:
            raise ValueError(f"attention {self.name!r} got {length} tokens, but a grid of {grid.length}: {grid}")
        qkv = self.project(attn, hidden_states)  # (B, N, K, E) each
        out = self.mix(attn, hidden_states, qkv, image_rotary_emb, attention_mask, grid)  # (B, N, K, E)
        return self.project_back(attn, out.to(qkv[2].dtype))

    @staticmethod
    def rotated(qkv: tuple[Tensor, Tensor, Tensor], rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, in the dtype of the values, and the values."""
        query, key = apply_rotary_qk(qkv[0], qkv[1], rotary, qkv[2].dtype)
        return query, key, qkv[2]

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Return the names of the parameters with their defaults; those without one have `dataclasses.MISSING`."""
        return {field.name: field.default for field in fields(cls)}  # pyright: ignore[reportArgumentType]


def register_replacement(kind: type[Kind]) -> type[Kind]:
    """Add a replacement to the table; a decorator of its class."""
    _TABLE[kind.name] = kind
    return kind


def replacement_names() -> list[str]:
    """Return the names of all replacements."""
    return list(REPLACEMENTS)


def replacement(name: str, **params: Any) -> Replacement:
    """Return a replacement.

    Args:
        name: one of `replacement_names()`.
        **params: of the replacement.

    Raises:
        ValueError: an unknown name or parameter, or a value out of its range.
    """
    if name not in REPLACEMENTS:
        raise ValueError(f"there is no attention {name!r}; use 'dense' or one of {', '.join(REPLACEMENTS)}")
    import_module(f"dit.attention.trainable.{REPLACEMENTS[name]}")
    kind = _TABLE[name]
    unknown = sorted(set(params) - set(kind.parameters()))
    if unknown:
        accepted = ", ".join(kind.parameters()) or "no parameters"
        raise ValueError(f"attention {name!r} takes no {', '.join(unknown)}; it takes {accepted}")
    return kind(**params)


def replace_attention(model: nn.Module, name: str, **params: Any) -> list[str]:
    """Replace the attention in the blocks of a network of ours; its projections stay, and new weights are added.

    Networks with the settings `attention` and `attention_params` record it there, so that they are saved and loaded
    with it.

    Args:
        model: with layers `SelfAttention` called `attn`.
        name: one of `replacement_names()`, or "dense", which takes the added weights away.
        **params: of the replacement.

    Returns:
        The names of the layers.

    Raises:
        ValueError: nothing to replace, or an unknown name or parameter.
    """
    bare: Any = unwrap(model)
    layers = {
        key: layer
        for key, layer in named_layers(bare)
        if isinstance(layer, SelfAttention) and key.rpartition(".")[2] == "attn"
    }
    if not layers:
        raise ValueError(f"{type(bare).__name__} has no layers 'attn' of the class SelfAttention to replace")
    if name == "dense" and params:
        raise ValueError(f"attention 'dense' takes no parameters, got {', '.join(params)}")
    for layer in layers.values():
        processor = SelfAttnProcessor() if name == "dense" else replacement(name, **params)
        _remove_weights(layer)
        if isinstance(processor, Replacement):
            for key, weight in processor.new_weights(layer).items():
                setattr(layer, key, weight.to(_like(layer)) if isinstance(weight, nn.Module) else weight)
        layer.set_processor(processor)  # pyright: ignore[reportArgumentType] (diffusers lists only its own)
    if "attention" in getattr(bare, "config", {}):
        bare.register_to_config(attention=name, attention_params=params or None)
    return list(layers)


def _remove_weights(layer: SelfAttention) -> None:
    """Take away what the layer's replacement has added."""
    if isinstance(layer.processor, Replacement):
        for key in layer.processor.new_weights(layer):
            delattr(layer, key)


def _like(layer: SelfAttention) -> Tensor:
    """Return a tensor whose device and dtype new weights take."""
    return next(layer.parameters())
