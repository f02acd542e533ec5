"""Training with quantized weights, without oscillation: a network learns while it computes with rounded numbers.

Oscillation-free quantization (OFQ, arXiv 2302.02210) found that a scale that is learned makes weights oscillate between
two levels. So the scale of a group of weights follows from their mean magnitude (StatsQ), and towards the end only
weights that lie at the edge between two levels still move (confidence-guided annealing, CGA).

The levels are those of a weight format of `dit.quant.formats`, so that `convert_trained` stores what was trained as it
is. The authors' levels are odd multiples of half a step and have no 0; ours have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.quant.diffusers_config import TesseraQuantConfig
from dit.quant.formats import grouped, weight_format
from dit.quant.formats.base import Scales, ungrouped
from dit.quant.layer_plan import connect_layers, replace_layer
from dit.quant.linear import QuantLinear
from dit.quant.marking import mark_quantized
from dit.quant.recipes import layer_scheme, recipe
from dit.quant.reference import fake_quantize_activations
from dit.quant.roles import network_name, quantizable_layers
from dit.quant.scheme import Scheme, formats_of
from dit.runtime.state import layer_key, unwrap

RECIPE = "int8"
"""The recipe that trained layers are stored by: plain rounding."""
WIDTHS = {4: 2.5, 6: 4.0}
"""Range of the levels by their bits, in mean magnitudes of the weights; all of it for more bits."""
BOUNDARY = 0.005
"""How near to the edge between two levels a weight is free, as a share of their distance (BR of the paper)."""


@dataclass(frozen=True)
class TrainedQuantization:
    """How a network is trained with rounded numbers.

    Args:
        bits: formats of weights and activations, see `dit.quant.scheme.formats_of`.
        skip: regular expressions of layers to leave as they are, each matched at the start of the layer's name.
        width: range of the levels, in mean magnitudes of the weights of a group: 2 in the paper, for networks that
            train long; None is `WIDTHS`, with which a trained network begins nearer to what it was.
        boundary: of the annealing, see `BOUNDARY`.

    Raises:
        ValueError: a number out of its range, or formats that are unknown.
    """

    bits: str = "w4a8"
    skip: tuple[str, ...] = ()
    width: float | None = None
    boundary: float = BOUNDARY

    def __post_init__(self) -> None:
        formats_of(self.bits)  # raises for unknown ones
        if self.width is not None and not 0 < self.width < float("inf"):
            raise ValueError(f"width is {self.width}; use a positive number of mean magnitudes, such as 2, or None")
        if not 0 < self.boundary <= 0.5:
            raise ValueError(f"boundary is {self.boundary}; use a share above 0 and up to 0.5, such as {BOUNDARY}")


class TrainedLinear(nn.Linear):
    """A linear layer that rounds its weights and inputs in each call, and learns as if it did not.

    The gradient passes through both roundings unchanged (straight through). Weights stay in float32, under the names
    that they had.

    Args:
        linear: the layer; its parameters become this one's.
        scheme: how it is rounded, see `dit.quant.scheme.Scheme`; without balance, rotation, branch and static scales.
        settings: of the training.

    Raises:
        ValueError: a scheme with a part that isn't trained.
    """

    def __init__(self, linear: nn.Linear, scheme: Scheme, settings: TrainedQuantization) -> None:
        nn.Module.__init__(self)
        plain = Scheme(
            scheme.weights, scheme.group, scheme.activations, scheme.activation_group, rounding=scheme.rounding
        )
        if scheme != plain:
            raise ValueError(f"layers are trained without balance, rotation, branch, shift and static scales: {scheme}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        group = weight_format(scheme.weights).resolve_group(scheme.group)
        self.scheme, self.settings = replace(scheme, group=group), settings

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        weight = _straight_through(self.weight, self.rounded_weight().to(self.weight.dtype))  # (N, K)
        with torch.no_grad():
            rounded = fake_quantize_activations(input.detach(), self.scheme).to(input.dtype)  # (..., K)
        return F.linear(_straight_through(input, rounded), weight, self.bias)

    @torch.no_grad()
    def rounded_weight(self) -> Tensor:
        """Return the weight that the layer computes with, float32, (N, K)."""
        groups, scales = self._scales()
        snapped = weight_format(self.scheme.weights).snap(groups, scales)  # (N, G, g)
        return ungrouped(snapped, self.in_features)

    @torch.no_grad()
    def settled(self) -> Tensor:
        """Return which weights are far from the edge between two levels, bool, (N, K)."""
        groups, scales = self._scales()
        below, above = weight_format(self.scheme.weights).neighbours(groups, scales)  # (N, G, g) each
        gap = above - below
        place = (groups - below) / torch.where(gap > 0, gap, 1)  # 0 to 1 between two levels
        is_free = (gap > 0) & (place - 0.5).abs().le(self.settings.boundary)
        return ~ungrouped(is_free, self.in_features)

    def quantized(self) -> QuantLinear:
        """Return the layer as it is stored and computed after the training; it has the same outputs."""
        fmt = weight_format(self.scheme.weights)
        groups, scales = self._scales()
        tensors = fmt.pack(fmt.snap(groups, scales), scales, self.in_features)
        bias = None if self.bias is None else self.bias.detach().clone()
        return QuantLinear.from_tensors(self.scheme, tensors, self.in_features, self.out_features, bias)

    def _scales(self) -> tuple[Tensor, Scales]:
        """Return the weight in groups, (N, G, g), and the scales that its mean magnitudes give (StatsQ)."""
        fmt = weight_format(self.scheme.weights)
        groups = grouped(self.weight.detach(), self.scheme.group or 0)
        largest = groups.abs().amax(-1, keepdim=True)  # (N, G, 1)
        width = WIDTHS.get(fmt.bits) if self.settings.width is None else self.settings.width
        if width is not None:
            counts = groups.new_full(groups.shape[1:2], groups.shape[2])  # weights of a group, without padding
            counts[-1] -= groups[0].numel() - self.in_features
            mean = groups.abs().sum(-1, keepdim=True) / counts[:, None]  # (N, G, 1)
            largest = torch.minimum(largest, width * mean)
        return groups, fmt.scales(torch.cat([-largest, largest], dim=-1), clip=1.0)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        fields = ", ".join(f"{name}={value}" for name, value in self.scheme.to_dict().items())
        return f"{super().extra_repr()}, {fields}"


def prepare_training(network: nn.Module, settings: TrainedQuantization) -> list[str]:
    """Have the linear layers of a network round their weights and inputs from now on, in place.

    Names and values of all parameters stay, so optimizers and checkpoints need not know.

    Args:
        network: of diffusers, transformers or ours; adapters may be on it.
        settings: how.

    Returns:
        Names of the layers.

    Raises:
        ValueError: no layer is worth it, or the network is quantized already.
    """
    if any(isinstance(one, QuantLinear | TrainedLinear) for one in network.modules()):
        raise ValueError(f"{network_name(network)} is quantized already; load it without quantization to train it")
    names = []
    for role in quantizable_layers(network, settings.skip):
        scheme = layer_scheme(recipe(RECIPE), role, settings.bits, calibrated=False)
        replace_layer(network, role, TrainedLinear(role.slot.linear, scheme, settings))
        names.append(role.name)
    if not names:
        raise ValueError(f"{network_name(network)} has no linear layer that is to be quantized: look at skip")
    return names


def convert_trained(network: nn.Module) -> list[str]:
    """Replace layers that were trained rounded by quantized ones with the same outputs, in place.

    The network then saves and loads like one of `quantize_`.

    Args:
        network: that `prepare_training` was called with.

    Returns:
        Names of the layers.

    Raises:
        ValueError: it has no such layers.
    """
    made: dict[TrainedLinear, QuantLinear] = {}
    for parent in list(network.modules()):
        for child, module in parent._modules.items():
            if isinstance(module, TrainedLinear):
                if module not in made:
                    made[module] = module.quantized().train(module.training)
                setattr(parent, child, made[module])
    if not made:
        raise ValueError(
            f"{network_name(network)} was not prepared for training with rounded numbers: nothing to store"
        )
    connect_layers(network)
    bare, settings = unwrap(network), next(iter(made)).settings
    schemes = {name: one.scheme for name, one in bare.named_modules() if isinstance(one, QuantLinear)}
    mark_quantized(bare, TesseraQuantConfig(RECIPE, settings.bits, list(settings.skip) or None, schemes))
    return [layer_key(name) for name in schemes]


def trained_layers(networks: Iterable[nn.Module]) -> list[TrainedLinear]:
    """Return the layers of some networks that round, each once."""
    return list(
        dict.fromkeys(one for network in networks for one in network.modules() if isinstance(one, TrainedLinear))
    )


@contextmanager
def annealing(layers: Sequence[TrainedLinear]) -> Iterator[float]:
    """Keep weights as they are that are far from the edge between two levels, while an optimizer steps inside.

    Confidence-guided annealing (arXiv 2302.02210, section 4.2): what is settled gets no gradient, and whatever momentum
    and decay do to it is undone. What is settled is found anew in each step, as in the authors' code, so nothing has to
    be kept between steps.

    Args:
        layers: of `trained_layers`; their gradients must be there.

    Yields:
        The share of weights that are settled.
    """
    kept: dict[TrainedLinear, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for layer in layers:
            if layer.weight.grad is not None:
                settled = layer.settled()  # (N, K)
                layer.weight.grad.masked_fill_(settled, 0)
                kept[layer] = settled, layer.weight.detach().clone()
    counts = [int(settled.sum()) for settled, _ in kept.values()]
    yield sum(counts) / max(sum(settled.numel() for settled, _ in kept.values()), 1)
    with torch.no_grad():
        for layer, (settled, before) in kept.items():
            layer.weight.copy_(torch.where(settled, before, layer.weight))


def _straight_through(x: Tensor, rounded: Any) -> Tensor:
    """Return rounded numbers whose gradient goes to the exact ones."""
    return x + (rounded - x).detach()
