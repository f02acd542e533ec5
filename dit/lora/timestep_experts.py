"""TD-LoRA (DyDiT++, arXiv 2504.06803): low-rank updates of which the second factor is mixed anew at every timestep.

    output = W x + b + scale * sum_i w_i(t) B_i (A x)        w(t) = softmax(router(features of t))

Each layer has a router of its own, one small linear layer: what it costs is nothing beside the factors, and all that
an adapter adds lies in the layers, so taking these off takes off all of it. B starts as zeros, as in LoRA. The routers
start at random: experts that are weighed alike have equal gradients and would stay equal for ever.

The paper gives no code. Here the router sees sinusoidal features of the noise level, of which the fastest has
`TURNS` periods over all timesteps, so that weights change smoothly along the way.

The layers learn the timestep from a hook on the network, which reads it among the arguments of every call. A file says
under which name and on which scale its network is given it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit.layers.embeddings import sinusoidal_embedding

METADATA = "td_lora"
"""Metadata of a file of this kind: its settings as JSON."""
KIND = "TD_LORA"
"""What stands where PEFT's configurations name their kind."""
MARK = ".timed_"
"""Part of every key of a file of this kind."""
FEATURES, TURNS = 32, 4
"""Features of the noise level that routers see, and periods of the fastest of them."""
SLOWEST = 100.0
"""Times that the slowest feature is slower."""


@dataclass(frozen=True)
class TimestepArgument:
    """How a network is told the timestep: `factor * level + offset`, with levels from 0 (data) to 1 (noise).

    Attributes:
        name: of the argument of its `forward`.
        factor: 1000 for timesteps, 1 for noise levels; negative where time runs from noise to data.
        offset: added.
    """

    name: str = "timestep"
    factor: float = 1000.0
    offset: float = 0.0

    def levels(self, value: Any) -> Tensor:
        """Return the noise level of each sample, (B,) float32, or (1,) of all of them.

        Args:
            value: of the argument: a number, (B,), or (B, ...) for parts of a sample, of which the noisiest counts.
        """
        levels = (torch.as_tensor(value).float() - self.offset) / self.factor
        return levels.reshape(1) if levels.ndim == 0 else levels.flatten(1).amax(1) if levels.ndim > 1 else levels


class TimestepReader:
    """Reads the timestep of each call of a network, for the layers of one adapter.

    Args:
        argument: of the network.
        adapter: name of the adapter.
        layer: name of one of its layers: once that is gone, the reader takes itself off at the next call.
    """

    def __init__(self, argument: TimestepArgument, adapter: str, layer: str) -> None:
        self.argument, self.adapter, self.layer = argument, adapter, layer
        self.features: Tensor | None = None  # (B, F), or (1, F) for all samples
        self.handle: Any = None

    def attach(self, network: nn.Module) -> None:
        """Read from now on what a network is called with."""
        self.handle = network.register_forward_pre_hook(self._read, with_kwargs=True)

    def _read(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self._is_used(network):
            self.handle.remove()
            return
        value = {**dict(zip(arguments_of(network), args, strict=False)), **kwargs}.get(self.argument.name)
        if value is None:
            raise ValueError(
                f"{type(network).__name__} was called without {self.argument.name}, by which its TD-LoRA "
                f"{self.adapter!r} mixes its experts: pass it, or take the adapter off"
            )
        levels = self.argument.levels(value)  # (B,) or (1,)
        self.features = sinusoidal_embedding(2 * math.pi * TURNS * levels, FEATURES, SLOWEST)  # (B, F)

    def _is_used(self, network: nn.Module) -> bool:
        layer: Any = network
        for part in self.layer.split("."):
            layer = getattr(layer, part, None)
        return isinstance(layer, ExpertLinear) and layer.readers.get(self.adapter) is self


class ExpertLinear(nn.Module, BaseTunerLayer):
    """A linear layer with the adapters of this kind around it, by name. See this module.

    Args:
        base_layer: whose weights stay as they are.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("timed_A", "timed_B", "timed_router")  # type: ignore[misc]
    other_param_names: ClassVar[tuple[str, ...]] = ("timed_dropout", "readers", "scales", "scaling")  # type: ignore[misc]

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.timed_A, self.timed_B = nn.ModuleDict(), nn.ParameterDict()
        self.timed_router, self.timed_dropout = nn.ModuleDict(), nn.ModuleDict()
        self.readers: dict[str, TimestepReader] = {}
        self.scales: dict[str, float] = {}  # as trained
        self.scaling: dict[str, float] = {}  # as used

    def add(self, name: str, rank: int, experts: int, scale: float, dropout: float, reader: TimestepReader) -> None:
        """Add an adapter, see `add_experts`."""
        weight = self.base_layer.weight
        place = {"device": weight.device, "dtype": weight.dtype if weight.is_floating_point() else torch.float32}
        down = nn.Linear(self.in_features, rank, bias=False, **place)
        router = nn.Linear(FEATURES, experts, **place)
        nn.init.normal_(down.weight, std=1 / rank)
        nn.init.normal_(router.weight, std=(FEATURES / 2) ** -0.5)  # the features have that length: logits of about 1
        nn.init.zeros_(router.bias)
        self.timed_A[name], self.timed_router[name] = down, router
        self.timed_B[name] = nn.Parameter(torch.zeros(experts, self.out_features, rank, **place))
        self.timed_dropout[name] = nn.Dropout(dropout)
        self.readers[name], self.scales[name], self.scaling[name] = reader, scale, scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (R, ..., inputs) to (R, ..., outputs); R is the number of samples, or a multiple of it, sample by sample.

        Raises:
            ValueError: R is no multiple of the number of timesteps.
        """
        result = self.base_layer(x, *args, **kwargs)  # (R, ..., outputs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.timed_A:
                result = result + self._update(name, x).to(result.dtype)
        return result

    def _update(self, name: str, x: Tensor) -> Tensor:
        """Return what an adapter adds, (R, ..., outputs)."""
        features = self.readers[name].features  # (B, F)
        if features is None:
            raise ValueError(f"the TD-LoRA {name!r} has seen no timestep: call the network, not a layer of it alone")
        if len(x) % len(features):
            raise ValueError(
                f"a layer got {len(x)} rows, but the network got {len(features)} timesteps: TD-LoRA can't tell which "
                "rows belong to which; call it with one timestep for all samples"
            )
        down, router, ups = self.timed_A[name], self.timed_router[name], self.timed_B[name]
        weights = router(features.to(x.device, ups.dtype)).float().softmax(-1).to(ups.dtype)  # (B, E)
        mixed = torch.einsum("be,eor->bor", weights, ups)  # (B, outputs, rank)
        hidden = down(self.timed_dropout[name](x.to(ups.dtype)))  # (R, ..., rank)
        rows = hidden.reshape(len(features), -1, hidden.shape[-1]) @ mixed.transpose(1, 2)  # (B, rows, outputs)
        return self.scaling[name] * rows.reshape(*x.shape[:-1], self.out_features)

    # ------------------------------------------------- what diffusers and PEFT call

    def set_scale(self, adapter: str, scale: float) -> None:
        """Use an adapter at a multiple of its scale."""
        if adapter in self.scales:
            self.scaling[adapter] = scale * self.scales[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters; None sets them as they were trained."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self.scales[name] if scale is None else self.scaling[name] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to be fused.

        Raises:
            ValueError: always: what is added changes with the timestep.
        """
        raise ValueError("TD-LoRA can't be fused into the weights: what it adds changes with the timestep; leave it on")

    def unmerge(self) -> None:
        """Do nothing: it is never fused."""


@dataclass(frozen=True)
class ExpertConfig:
    """What stands in `network.peft_config` for an adapter of this kind."""

    peft_type: str = KIND


def add_experts(
    network: Any,
    targets: Sequence[str],
    *,
    rank: int,
    experts: int,
    scale: float,
    dropout: float = 0.0,
    argument: TimestepArgument | None = None,
    name: str = "default",
) -> None:
    """Put a new adapter of this kind on layers of a network.

    Args:
        network: with nothing, or adapters of this kind, on it.
        targets: names of its linear layers.
        rank: of the factors.
        experts: E, second factors of each layer.
        scale: of what is added.
        dropout: of what goes into the first factor.
        argument: how the network is told the timestep; None is `timestep`, 0 to 1000.
        name: of the adapter.

    Raises:
        ValueError: the network takes no such argument.
    """
    argument = argument or TimestepArgument()
    if argument.name not in arguments_of(network):
        raise ValueError(
            f"{type(network).__name__} takes no argument {argument.name!r}, by which TD-LoRA mixes its experts; it "
            f"takes {', '.join(arguments_of(network))}"
        )
    held = getattr(network, "peft_config", {})
    reader = TimestepReader(argument, name, targets[0])
    reader.attach(network)
    for target in targets:
        layer = network.get_submodule(target)
        if not isinstance(layer, ExpertLinear):
            layer = ExpertLinear(layer)
            network.set_submodule(target, layer)
        layer.add(name, rank, experts, scale, dropout, reader)
        layer.set_adapter(layer.active_adapters if held else [name])
        layer.train(network.training)
    network.peft_config = {**held, name: ExpertConfig()}


def expert_layers(network: nn.Module, name: str = "default") -> dict[str, ExpertLinear]:
    """Return the layers of a network that hold an adapter of this kind, by name."""
    return {
        layer: module
        for layer, module in network.named_modules()
        if isinstance(module, ExpertLinear) and name in module.readers
    }


def expert_tensors(network: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter by the keys that they have in files, without prefix."""
    found: dict[str, nn.Parameter] = {}
    for layer, module in expert_layers(network, name).items():
        router = module.timed_router[name]
        found[f"{layer}.timed_A.weight"] = module.timed_A[name].weight  # type: ignore[assignment]
        found[f"{layer}.timed_B.weight"] = module.timed_B[name]
        found[f"{layer}.timed_router.weight"], found[f"{layer}.timed_router.bias"] = router.weight, router.bias  # type: ignore[assignment]
    return found


def describe_experts(network: nn.Module, name: str = "default") -> str:
    """Return what a file says of an adapter, as JSON."""
    layer = next(iter(expert_layers(network, name).values()))
    argument = layer.readers[name].argument
    return json.dumps({"scale": layer.scales[name], "timestep": dataclasses.asdict(argument)}, sort_keys=True)


def readers_of(network: nn.Module) -> list[TimestepReader]:
    """Return the readers on a network."""
    owners = (getattr(hook, "__self__", None) for hook in network._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, TimestepReader)]


def remove_readers(network: nn.Module) -> None:
    """Take the readers off a network whose adapters are gone; each would do so itself at the next call."""
    for reader in readers_of(network):
        if not reader._is_used(network):
            reader.handle.remove()


def checkpointed(network: nn.Module) -> Callable[..., Any]:
    """Return a function for gradient checkpointing that computes blocks anew at the timesteps of their own call.

    A network may be called several times before the backward pass; the readers then hold those of the last call.

    Args:
        network: with adapters of this kind.
    """
    readers = readers_of(network)

    def run(block: Callable[..., Any], *args: Any) -> Any:
        seen = [reader.features for reader in readers]

        def again(*inputs: Any) -> Any:
            now = [reader.features for reader in readers]
            _set_features(readers, seen)
            try:
                return block(*inputs)
            finally:
                _set_features(readers, now)

        return checkpoint(again, *args, use_reentrant=False)

    return run


def _set_features(readers: Sequence[TimestepReader], values: Sequence[Tensor | None]) -> None:
    for reader, value in zip(readers, values, strict=True):
        reader.features = value


def arguments_of(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a network's `forward`, as its class declares them."""
    return tuple(inspect.signature(type(network).forward).parameters)[1:]
