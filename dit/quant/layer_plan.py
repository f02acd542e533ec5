"""LayerPlan: how the layers of a network are quantized, and quantizing them one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dit.quant import recipes
from dit.quant.balance import Balance
from dit.quant.gelu import fused_gelus
from dit.quant.layer import find_balance, quantize_linear
from dit.quant.linear import QuantLinear, can_share, share_inputs
from dit.quant.recipes import KEPT, Recipe, layer_scheme
from dit.quant.roles import Role, network_name, quantizable_layers
from dit.quant.scheme import Scheme
from dit.quant.statistics import LayerStatistics
from dit.runtime.families import UnknownFamilyError, family_of
from dit.runtime.state import unwrap

Progress = Callable[[int, int, str], None]
"""Called with (layers done, layers in all, name of the layer)."""


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Attributes:
        name: of the layer; of a pipeline's second network it begins with that of the component.
        kind: what it is for, see `dit.quant.roles.Role`.
        scheme: how it is quantized.
        error: relative error of its output, of the noise level where it is largest; None without calibration.
        bytes_before: of weight and bias.
        bytes_after: of all its tensors.
        notes: where it differs from what the recipe asks for, and why.
    """

    name: str
    kind: str
    scheme: Scheme
    error: float | None
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerPlan:
    """How the layers of a network are to be quantized.

    Attributes:
        recipe: of all layers.
        bits: formats.
        statistics: of a calibration, by name with the prefix.
        prefix: of the network's layers in calibrations and reports.
        skip: see `quantize_`.
        layers: see `quantize_`.
        choices: formats of single layers instead of `bits`, see `dit.quant.mixed_precision`; `KEPT` leaves one as it
            is.
    """

    recipe: Recipe
    bits: str
    statistics: Mapping[str, LayerStatistics]
    prefix: str = ""
    skip: tuple[str, ...] = ()
    layers: Mapping[str, Scheme | None] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)

    def scheme(self, role: Role, outputs: int) -> Scheme | None:
        """Return how a layer is quantized; None leaves it as it is.

        Args:
            role: the layer.
            outputs: of all layers that read its input.
        """
        if role.name in self.layers:
            return self.layers[role.name]
        bits = self.choices.get(role.name, self.bits)
        if bits == KEPT:
            return None
        calibrated = self.prefix + role.name in self.statistics
        return layer_scheme(self.recipe, role, bits, calibrated=calibrated, outputs=outputs)


def quantized_layers(
    network: nn.Module, plan: LayerPlan, progress: Progress | None = None
) -> Iterator[tuple[Role, QuantLinear, LayerReport]]:
    """Quantize the layers of a network one after the other; the network stays as it is.

    Args:
        network: wrapped or not.
        plan: how.
        progress: see `Progress`.

    Yields:
        A layer, what replaces it, and what became of it. Layers that read one input share what they make of it.

    Raises:
        ValueError: no layer is to be quantized, or one can't be.
    """
    roles = quantizable_layers(network, plan.skip)
    for field_name, names in (("layers", plan.layers), ("the plan", plan.choices)):
        unknown = sorted(set(names) - {role.name for role in roles})
        if unknown:
            raise ValueError(
                f"{field_name} names {', '.join(unknown[:3])}, which {network_name(network)} can't quantize"
            )
    groups = [group for group in layer_groups(network, roles, plan) if any(scheme for _, scheme in group)]
    total, done = sum(len(group) for group in groups), 0
    if not total:
        raise ValueError(f"{network_name(network)} has no linear layer that is to be quantized: look at skip")
    for group in groups:
        balance = _balance(group, plan)
        made_of: dict[nn.Linear, QuantLinear] = {}
        for role, scheme in group:
            if progress is not None:
                progress(done, total, role.name)
            done += 1
            if scheme is None:
                continue
            made, entry = _quantize(role, scheme, balance, plan)
            made_of[role.slot.linear] = made
            yield role, made, entry
        if len(made_of) > 1 and len({(one.scheme.activations, one.scheme.rotate) for one in made_of.values()}) == 1:
            share_inputs(made_of.values())
    if progress is not None:
        progress(total, total, "")


def replace_layer(network: nn.Module, role: Role, made: nn.Module) -> None:
    """Put what replaces a layer in its place, wherever the layer stands.

    Args:
        network: that holds it.
        role: of the layer.
        made: its replacement.
    """
    old = role.slot.linear
    for parent in list(unwrap(network).modules()):
        for child, module in parent._modules.items():
            if module is old:
                setattr(parent, child, made.train(old.training))


def layer_groups(network: nn.Module, roles: Sequence[Role], plan: LayerPlan) -> list[list[tuple[Role, Scheme | None]]]:
    """Divide layers into those that read one input, with their schemes.

    Args:
        network: that holds them.
        roles: the layers.
        plan: how they are quantized.
    """
    leaders = _leaders(network, roles, plan)
    groups: dict[str, list[Role]] = {}
    seen: set[nn.Linear] = set()
    for role in roles:
        if role.slot.linear not in seen:  # a layer with several parents is one
            seen.add(role.slot.linear)
            groups.setdefault(leaders.get(role.name, role.name), []).append(role)
    found = []
    for group in groups.values():
        outputs = sum(one.slot.linear.out_features for one in group)
        found.append([(role, _readable(network, role, plan.scheme(role, outputs))) for role in group])
    return found


def _readable(network: nn.Module, role: Role, scheme: Scheme | None) -> Scheme | None:
    """Return a scheme with int8 weights for layers that a network of transformers keeps in float32.

    Such networks cast the input of the layer to the dtype of its weight, unless that is int8; packed codes are uint8.
    """
    bare = unwrap(network)
    kept = set(getattr(bare, "_keep_in_fp32_modules", None) or ())
    if scheme is None or not isinstance(bare, PreTrainedModel) or kept.isdisjoint(role.name.split(".")):
        return scheme
    return replace(scheme, weights="int8", group=None)


def connect_layers(network: nn.Module) -> None:
    """Let quantized layers that read one input share what they make of it, and fuse projections with their GELU.

    What reads one input is known by the network's family. For networks whose layers were loaded; `quantize_` does it.

    Args:
        network: with quantized layers in place, wrapped or not.
    """
    roles = [role for role in quantizable_layers(network) if isinstance(role.slot.linear, QuantLinear)]
    leaders = _leaders(network, roles, LayerPlan(recipes.recipe("int8"), "w8a8", {}))
    groups: dict[str, list[QuantLinear]] = {}
    for role in roles:
        layer: Any = role.slot.linear
        groups.setdefault(leaders.get(role.name, role.name), []).append(layer)
    for group in groups.values():
        if len(group) > 1 and can_share(group):
            share_inputs(group)
    for parent, child, module in list(fused_gelus(network)):
        setattr(parent, child, module)


def _leaders(network: nn.Module, roles: Sequence[Role], plan: LayerPlan) -> dict[str, str]:
    """Return the first of the layers that read the same input, by layer; by calibration, else as the family says."""
    names = {role.name for role in roles}
    found: dict[str, str] = {}
    for role in roles:
        statistics = plan.statistics.get(plan.prefix + role.name)
        same = [] if statistics is None else [one.removeprefix(plan.prefix) for one in statistics.siblings]
        for name in same:
            if name in names:
                found.setdefault(name, same[0])
    try:
        folds = family_of(network).folds(network)
    except UnknownFamilyError:
        folds = []
    for fold in folds:
        for name in fold.consumers:
            if name in names:
                found.setdefault(name, fold.consumers[0])
    return found


def _balance(group: Sequence[tuple[Role, Scheme | None]], plan: LayerPlan) -> Balance | None:
    """Find one balance for all layers of a group that want any."""
    wanting = [(role, scheme) for role, scheme in group if scheme is not None and scheme.alpha is not None]
    if len(wanting) < 2:
        return None
    name = plan.prefix + wanting[0][0].name
    weights = [role.slot.linear.weight for role, _ in wanting]
    scheme = wanting[0][1]
    return find_balance(weights, scheme, plan.statistics[name], aggregate=plan.recipe.aggregate, name=name)


def _quantize(role: Role, scheme: Scheme, balance: Balance | None, plan: LayerPlan) -> tuple[QuantLinear, LayerReport]:
    """Quantize a layer."""
    linear, name = role.slot.linear, plan.prefix + role.name
    if hasattr(linear, "_hf_hook"):
        raise ValueError(f"{name} is offloaded: quantize the pipeline first, then offload it")
    if linear.weight.device.type == "meta":
        raise ValueError(f"the weights of {name} are not in memory (offloaded?): quantize the pipeline before that")
    statistics = plan.statistics.get(name)
    shared = balance if scheme.alpha is not None else None
    if shared is not None:
        scheme = replace(scheme, alpha=shared.alpha)
    found = quantize_linear(
        linear, scheme, statistics, name=name, shared_balance=shared, aggregate=plan.recipe.aggregate
    )
    bias = None if linear.bias is None else linear.bias.detach()
    made = QuantLinear.from_tensors(found.scheme, found.tensors, linear.in_features, linear.out_features, bias)
    errors = [] if found.bin_errors is None else [one for one in found.bin_errors.tolist() if not math.isnan(one)]
    before = sum(one.nbytes for one in linear.parameters())
    error = max(errors) if errors else None
    return made, LayerReport(name, role.kind, found.scheme, error, before, made.nbytes, found.notes)
