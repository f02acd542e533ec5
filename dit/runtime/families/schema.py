"""Columns of the family table: what a mechanism may ask about a transformer that it doesn't know."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from inspect import Parameter, Signature, signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit.runtime.families.folding import Fold, FoldedGroup, resolve_folds
from dit.runtime.families.layer_names.rule import LayerNames
from dit.runtime.families.modules import is_attention
from dit.runtime.families.tokens import Axes, Kind, TokenLayout
from dit.runtime.state import named_layers, unwrap

Inputs = Mapping[str, Any]

TIMESTEP_NAME = re.compile(r"t|time|(\w+_)?timesteps?|\w+_time|sigmas?")
"""Names of arguments that tell the noise level, in networks that no row describes."""


@dataclass(frozen=True)
class TimestepScale:
    """What the transformer receives for a timestep t of the scheduler: `offset + factor * t`.

    Written for schedulers with 1000 training steps, as all of these families have.
    """

    factor: float = 1.0
    offset: float = 0.0

    def received(self, timestep: float) -> float:
        """Return the transformer's value for a scheduler's timestep."""
        return self.offset + self.factor * timestep

    def scheduler_timestep(self, received: Tensor) -> Tensor:
        """Return the scheduler's timestep for what a transformer received, float32."""
        return (received.float() - self.offset) / self.factor


@dataclass(frozen=True)
class TrigFlowScale(TimestepScale):
    """Timesteps are angles in [0, pi/2] and the transformer receives sin / (sin + cos) (arXiv 2503.09641)."""

    def received(self, timestep: float) -> float:
        """Return the transformer's value for a scheduler's angle."""
        return math.sin(timestep) / (math.sin(timestep) + math.cos(timestep))

    def scheduler_timestep(self, received: Tensor) -> Tensor:
        """Return the scheduler's angle for what a transformer received, float32."""
        return torch.atan2(received.float(), 1.0 - received.float())


@dataclass(frozen=True)
class BranchLayout:
    """How a pipeline asks for the guided and the unguided prediction.

    Args:
        kind: "batched": one call on a doubled batch; "two_calls": one call a branch; "none": no second branch.
        order: the branches in the order of the parts of the batch, or of the calls.
        embedded: the guidance scale is also (or only) an input of the transformer.
    """

    kind: Literal["batched", "two_calls", "none"]
    order: tuple[str, ...]
    embedded: bool = False


UNCOND_FIRST = BranchLayout("batched", ("uncond", "cond"))
COND_FIRST = BranchLayout("batched", ("cond", "uncond"))
TWO_CALLS = BranchLayout("two_calls", ("cond", "uncond"))
TWO_CALLS_EMBEDDED = BranchLayout("two_calls", ("cond", "uncond"), embedded=True)
EMBEDDED = BranchLayout("none", ("cond",), embedded=True)


@dataclass(frozen=True)
class PipelineRow:
    """A pipeline that runs the transformer.

    Args:
        name: its class.
        branches: its guidance.
        guidance_argument: the argument of its call that switches on the second branch; None if there is none.
        guidance_off: the largest value of it that leaves the second branch away.
        timestep: what it hands to the transformer, where that differs from the family's.
    """

    name: str
    branches: BranchLayout
    guidance_argument: str | None = "guidance_scale"
    timestep: TimestepScale | None = None
    guidance_off: float = 1.0


@dataclass(frozen=True)
class BlockList:
    """A list of blocks of the network.

    Args:
        path: dotted name of the ModuleList.
        stream: which tokens its blocks work on.
        refiner: it prepares one of the streams and is not part of the trunk.
    """

    path: str
    stream: Literal["image", "text", "joint"] = "image"
    refiner: bool = False


@dataclass(frozen=True)
class AttentionPattern:
    """Attention layers by name.

    Args:
        pattern: regular expression that the whole normalised name matches.
        kind: who looks at whom.
        axes: what axes of the grid one sequence runs over.
    """

    pattern: str
    kind: Kind
    axes: Axes = "thw"


@dataclass(frozen=True)
class AttentionLayer:
    """An attention layer of a model, with its normalised name."""

    name: str
    module: nn.Module
    kind: Kind
    axes: Axes


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        name: how the family is called here.
        transformer: class name of the network.
        package: where that class lives, "diffusers" or a module of ours.
        pipelines: pipelines that run it, the usual one first.
        block_lists: in the order of execution.
        attention: names of all attention layers.
        layout: the tokens of a call, from the bare model and the named inputs.
        timestep: what the transformer receives, or how its config tells; None if it is not known.
        skip: regular expressions of modules, with all below them, whose precision should stay.
        modulation: regular expressions of the linear layers that make shifts, scales and gates of the timestep; they
            see one token a sample, so only their weights cost.
        fold: rescalings between neighbouring layers that leave the result as it is.
        layers: names of its linear and convolution layers, here and in the code that first published the network.
        depths: blocks of each list that is no refiner, in their order, for every size that was published.
        lora_targets: ends of the names of layers that LoRAs usually adapt (PEFT's `target_modules`).
        latent_argument: name of the argument with the noisy latents.
        text_argument: name of the argument with the text states; None if it takes none.
        timestep_argument: name of the argument with the timestep.
        interleaved: the block lists take turns block by block instead of one list after the other.
        generic: the row was guessed from the structure of an unknown class.
    """

    name: str
    transformer: str
    pipelines: tuple[PipelineRow, ...]
    block_lists: tuple[BlockList, ...]
    attention: tuple[AttentionPattern, ...]
    layout: Callable[[nn.Module, Inputs], TokenLayout]
    timestep: TimestepScale | Callable[[Any], TimestepScale] | None = TimestepScale()
    skip: tuple[str, ...] = ()
    modulation: tuple[str, ...] = ()
    fold: tuple[Fold, ...] = ()
    layers: tuple[LayerNames, ...] = ()
    depths: tuple[tuple[int, ...], ...] = ()
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    package: str = "diffusers"
    latent_argument: str = "hidden_states"
    text_argument: str | None = "encoder_hidden_states"
    timestep_argument: str = "timestep"
    interleaved: bool = False
    generic: bool = False

    # ---------------------------------------------------------------- pipelines

    def pipeline(self, pipeline: object | str | None = None) -> PipelineRow | None:
        """Return the row of a pipeline.

        Args:
            pipeline: an instance, a class name, or None for the family's usual one.

        Returns:
            The row, looked up along the class's ancestors; None if it is not listed.
        """
        if pipeline is None:
            return self.pipelines[0] if self.pipelines else None
        names = [pipeline] if isinstance(pipeline, str) else [cls.__name__ for cls in type(pipeline).__mro__]
        rows = {row.name: row for row in self.pipelines}
        return next((rows[name] for name in names if name in rows), None)

    def branches(self, pipeline: object | str | None = None) -> BranchLayout | None:
        """Return how a pipeline guides; None if it is not listed."""
        row = self.pipeline(pipeline)
        return row.branches if row else None

    # -------------------------------------------------------------------- calls

    def bind(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name the inputs of a call, defaults included.

        Args:
            model: the transformer, wrapped or not.
            args: positional inputs.
            kwargs: named inputs.

        Raises:
            TypeError: the transformer doesn't take them.
        """
        known = _signature(type(unwrap(model)))
        bound = known.bind(None, *args, **kwargs)  # None stands for self
        bound.apply_defaults()
        named = dict(bound.arguments)
        named.pop(next(iter(named)))
        rest = next((name for name, one in known.parameters.items() if one.kind is Parameter.VAR_KEYWORD), "")
        return {**named, **named.pop(rest, {})}

    def token_grid(self, model: nn.Module, inputs: Inputs) -> TokenLayout:
        """Return the tokens of a call.

        Args:
            model: the transformer, wrapped or not.
            inputs: its named inputs, see `bind`.

        Raises:
            ValueError: the inputs don't tell.
        """
        return self.layout(unwrap(model), inputs)

    def latents(self, inputs: Inputs) -> Tensor:
        """Return the noisy latents of a call, batch first; lists of samples are stacked.

        Raises:
            ValueError: the call has none by the name that the row knows.
        """
        latents = inputs.get(self.latent_argument)
        if latents is None:
            raise ValueError(
                f"the call of {self.transformer} has no latents: looked for {self.latent_argument!r} among "
                f"{', '.join(inputs)}. Add a row to dit/runtime/families"
            )
        return torch.stack(list(latents)) if isinstance(latents, list | tuple) else latents

    def timestep_scale(self, model: nn.Module, pipeline: object | str | None = None) -> TimestepScale | None:
        """Return what the transformer receives for a scheduler's timestep.

        Args:
            model: the transformer, wrapped or not.
            pipeline: who calls it; matters where a family's pipelines differ.

        Returns:
            The scale; None if it is not known.
        """
        row = self.pipeline(pipeline)
        if row is not None and row.timestep is not None:
            return row.timestep
        if self.timestep is None or isinstance(self.timestep, TimestepScale):
            return self.timestep
        return self.timestep(unwrap(model).config)

    def received_timestep(self, inputs: Inputs) -> Any:
        """Return the timestep that a call hands the network; None if it hands none.

        A row that was guessed looks for other names too where the usual one is not given.

        Args:
            inputs: its named inputs, see `bind`.
        """
        received = inputs.get(self.timestep_argument)
        if received is not None or not self.generic:
            return received
        given = (value for name, value in inputs.items() if TIMESTEP_NAME.fullmatch(name))
        return next((value for value in given if value is not None), None)

    def scheduler_timestep(
        self, model: nn.Module, inputs: Inputs, pipeline: object | str | None = None
    ) -> Tensor | None:
        """Return the scheduler's timestep of a call, (), float32; None if the scale is not known.

        Where tokens have timesteps of their own (clips that continue a clean first frame), it is the largest.
        """
        scale, received = self.timestep_scale(model, pipeline), self.received_timestep(inputs)
        if scale is None or received is None:
            return None
        return scale.scheduler_timestep(torch.as_tensor(received)).max()

    # ------------------------------------------------------------------ modules

    def blocks(self, model: nn.Module, refiners: bool = True) -> list[tuple[str, nn.Module]]:
        """Return the blocks in the order of execution, with their normalised names.

        Args:
            model: the transformer, wrapped or not.
            refiners: whether to include those that only prepare a stream.
        """
        modules = dict(named_layers(unwrap(model)))
        lists = [entry for entry in self.block_lists if refiners or not entry.refiner]
        named = [list(_entries(entry.path, modules)) for entry in lists]
        if self.interleaved:
            return [block for turn in zip(*named, strict=True) for block in turn]
        return [block for entries in named for block in entries]

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """Return all attention layers of the blocks in the order of execution.

        Args:
            model: the transformer, wrapped or not.
        """
        modules = dict(named_layers(unwrap(model)))
        layers = []
        for block, _ in self.blocks(model):
            for name, module in modules.items():
                if name.startswith(block + ".") and is_attention(module) and (found := self.attention_pattern(name)):
                    layers.append(AttentionLayer(name, module, found.kind, found.axes))
        return layers

    def attention_pattern(self, name: str) -> AttentionPattern | None:
        """Return the pattern that a normalised name matches, or None."""
        return next((entry for entry in self.attention if re.fullmatch(entry.pattern, name)), None)

    def skips(self, name: str) -> bool:
        """Return whether the module of a normalised name should keep its precision."""
        return any(re.match(rf"(?:{pattern})(?:\.|$)", name) for pattern in self.skip)

    def folds(self, model: nn.Module) -> list[FoldedGroup]:
        """Return the foldings that this model has, see `FoldedGroup`."""
        blocks = [name for name, _ in self.blocks(model)]
        return resolve_folds(self.fold, blocks, dict(named_layers(unwrap(model))))

    def lora_target_names(self, model: nn.Module) -> list[str]:
        """Return the normalised names of the linear layers that LoRAs usually adapt."""
        return [
            name
            for name, module in named_layers(unwrap(model))
            if isinstance(getattr(module, "base_layer", module), nn.Linear)
            and any(name == target or name.endswith("." + target) for target in self.lora_targets)
        ]

    # --------------------------------------------------------------------- tests

    def transformer_class(self) -> type[nn.Module]:
        """Return the class of the network."""
        return getattr(import_module(self.package), self.transformer)


def _entries(path: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Return the blocks of the list at `path`, with their names."""
    pattern = re.compile(re.escape(path) + r"\.\d+")
    return ((name, module) for name, module in modules.items() if pattern.fullmatch(name))


@lru_cache(maxsize=256)
def _signature(cls: type[nn.Module]) -> Signature:
    return signature(cls.forward)
