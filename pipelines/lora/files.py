"""LoRA files of all dialects, fitted to the layers of one network, all of them checked.

`dit.lora` reads the files and knows the names of a family's layers in the code that first published it; here a file
meets a network, whose own names come first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dit.lora.files import (
    PEFT_CONFIG,
    SHOWN,
    WEIGHT_NAMES,
    LoraFile,
    LoraFileError,
    LoraMisfitError,
    adapter_config_file,
    check_values,
    find_lora_file,
    lacks_alpha,
    other_kind,
    read_lora_file,
)
from dit.lora.layers import LoraLayer, LoraParts, check_kind, complete, gather
from dit.lora.names import bare_name, to_diffusers
from dit.lora.peft_config import peft_config
from dit.runtime.families import UnknownFamilyError, call_family_of
from dit.runtime.families.layer_names.rule import LayerNames

__all__ = [
    "PEFT_CONFIG",
    "WEIGHT_NAMES",
    "FittedLora",
    "LoraFile",
    "LoraFileError",
    "LoraMisfitError",
    "adaptable_layers",
    "adapter_config_file",
    "check_lora_file",
    "find_lora_file",
    "fit_lora",
    "lacks_alpha",
    "read_lora_file",
]


@dataclass(frozen=True)
class FittedLora:
    """A LoRA in diffusers' layout, for one network.

    Attributes:
        tensors: `LAYER.lora_A.weight`, ...; without prefix.
        config: arguments of PEFT's `LoraConfig`, with the rank and the alpha of each layer.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def check_lora_file(lora: LoraFile) -> None:
    """Check what can be checked without a network: values, and that no factor lacks the other.

    Keys that are not understood are left to the loader of the network's family.

    Raises:
        LoraFileError: with the key and the reason.
    """
    check_values(lora)
    gather(lora)


def fit_lora(lora: LoraFile, network: nn.Module) -> FittedLora:
    """Find the layers of a network that a LoRA file adapts; the whole file fits, or it is refused.

    Args:
        lora: the file; its layers named as in the network, or as in the code that first published the family.
        network: with linear and convolution layers, perhaps with other adapters on them.

    Returns:
        The LoRA in diffusers' layout.

    Raises:
        LoraMisfitError: keys that name no layer of the network.
        LoraFileError: with the keys and the reason.
    """
    check_values(lora)
    found, unknown = gather(lora)
    layers, rules = adaptable_layers(network), _rules_of(network)
    placed: dict[str, LoraLayer] = {}
    for written, parts in found.items():
        pieces = _pieces(lora, written, parts, layers, rules)
        if pieces is None:
            unknown += parts.keys.values()
            continue
        for name, piece in pieces.items():
            if name in placed:
                raise LoraFileError(f"{lora.name} holds two LoRAs for the layer {name}, one of them {written!r}.")
            placed[name] = piece
    if unknown:
        raise LoraMisfitError(_misfit(lora, sorted(unknown), layers))
    check_kind(lora)
    return FittedLora(_diffusers_tensors(placed), peft_config(lora.name, placed, layers))


def _rules_of(network: nn.Module) -> tuple[LayerNames, ...]:
    """Return the names of a network's layers in its family; none for a class that is not listed."""
    try:
        return call_family_of(network).layers
    except UnknownFamilyError:
        return ()


def _pieces(
    lora: LoraFile, written: str, parts: LoraParts, layers: Mapping[str, nn.Module], rules: tuple[LayerNames, ...]
) -> dict[str, LoraLayer] | None:
    """Return the LoRA of one name in a file by the network's layers; None if it names none of them."""
    name, flat = bare_name(written)
    direct = _place(written, name, flat, layers)
    if direct is not None:
        _check_shapes(lora.name, direct, parts, layers[direct])
        return {direct: complete(lora, direct, parts)}
    layer = complete(lora, name, parts)
    try:
        pieces = to_diffusers(rules, name, flat, layer)
    except LoraFileError as error:
        raise LoraFileError(f"{lora.name}: {error}") from error
    if pieces is None or not pieces.keys() <= layers.keys():
        return None
    for one, piece in pieces.items():
        _check_shapes(lora.name, one, piece, layers[one])
    return pieces


def adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the linear and convolution layers of a network by name; adapters on them are looked through."""
    layers: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        if any(part.startswith(("lora_", "timed_", "base_layer")) for part in name.split(".")):
            continue
        base = getattr(module, "base_layer", module)
        if isinstance(base, nn.Linear | nn.Conv2d | nn.Conv3d):
            layers[name] = base
    return layers


def _place(written: str, name: str, flat: bool, layers: Mapping[str, nn.Module]) -> str | None:
    """Return the layer of a network that a name in a file is by the network's own names; None for none."""
    if written in layers:
        return written
    if not flat:
        return name if name in layers else None
    return next((layer for layer in layers if layer.replace(".", "_") == name), None)


def _misfit(lora: LoraFile, unknown: list[str], layers: Mapping[str, nn.Module]) -> str:
    """Describe which keys fit no layer, and which layers there are."""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in layers))
    some = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
    kind = other_kind(unknown)
    share = "none" if len(unknown) == len(lora.tensors) else "only a part"
    return (
        f"{lora.name} doesn't fit this model: {share} of it has a place here. {len(unknown)} of {len(lora.tensors)} "
        f"keys are of no known layer or layout: {some}. The model has the layers {', '.join(kinds)}."
        + (f" It is {kind}, not a LoRA of two low-rank factors." if kind else "")
    )


def _check_shapes(file: str, name: str, layer: LoraParts | LoraLayer, module: Any) -> None:
    """Refuse factors that can't be multiplied onto a layer's weight."""
    down = layer.factors[0] if isinstance(layer, LoraParts) else layer.down
    if isinstance(module, nn.Linear):
        inner, outer, kernel = module.in_features, module.out_features, ()
    else:
        inner, outer, kernel = module.in_channels // module.groups, module.out_channels, tuple(module.kernel_size)
    rank = down.shape[0] if down.ndim else 0
    wanted = {
        "down": (rank, inner, *kernel),
        "up": (outer, rank, *(1 for _ in kernel)),
        "bias": (outer,),
        "magnitude": (outer,),
    }
    for part, shape in wanted.items():
        tensor = getattr(layer, part)
        if tensor is not None and (tuple(tensor.shape) != shape or not rank):
            raise LoraFileError(
                f"{file}: {layer.keys[part]} has the shape {tuple(tensor.shape)}, expected {shape} with a rank of at "
                f"least 1: the model's {name} maps {inner} values to {outer}. Was it trained on a model of another "
                "size?"
            )


def _diffusers_tensors(placed: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """Name the tensors as diffusers does."""
    tensors: dict[str, Tensor] = {}
    for name, layer in placed.items():
        named = {
            "lora_A.weight": layer.down,
            "lora_B.weight": layer.up,
            "lora_B.bias": layer.bias,
            "lora_magnitude_vector": layer.magnitude,
        }
        tensors |= {f"{name}.{end}": tensor for end, tensor in named.items() if tensor is not None}
    return tensors
