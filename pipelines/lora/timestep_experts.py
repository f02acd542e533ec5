"""TD-LoRA files (see `dit.lora.timestep_experts`) fitted to one network: all of a file fits, or nothing changes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import get_adapter_name
from torch import Tensor, nn

from dit.lora.files import SHOWN, LoraFile, LoraFileError, LoraMisfitError, check_values
from dit.lora.timestep_experts import (
    FEATURES,
    KIND,
    MARK,
    METADATA,
    TimestepArgument,
    add_experts,
    arguments_of,
    expert_tensors,
)
from pipelines.lora.files import adaptable_layers
from pipelines.lora.lycoris import check_company

PARTS = ("timed_A.weight", "timed_B.weight", "timed_router.weight", "timed_router.bias")
PREFIX = "transformer."


def is_experts(lora: LoraFile) -> bool:
    """Return whether a file is a TD-LoRA."""
    return METADATA in lora.metadata or any(MARK in key for key in lora.tensors)


def put_experts(network: Any, lora: LoraFile, adapter_name: str | None = None) -> str:
    """Put a TD-LoRA on a network; all of it fits, or nothing is changed.

    Args:
        network: with the methods of diffusers' `PeftAdapterMixin`.
        lora: for which `is_experts`.
        adapter_name: for `set_adapters`, `delete_adapters`; None makes one up.

    Returns:
        The name of the adapter.

    Raises:
        LoraMisfitError: keys that have no place in the network, or a network that is told no such timestep.
        LoraFileError: damaged, of another size, or beside adapters that it can't stand beside.
    """
    check_values(lora)
    check_company(network, lora.name, KIND)
    scale, argument = _settings(lora)
    if argument.name not in arguments_of(network):
        raise LoraMisfitError(
            f"{lora.name} reads the timestep from the argument {argument.name!r}, which {type(network).__name__} "
            "doesn't take: it was trained on another model."
        )
    layers = adaptable_layers(network)
    parts = _by_layer(lora, layers)
    rank, experts = _sizes(lora, parts, layers)
    name = get_adapter_name(network) if adapter_name is None else adapter_name
    if name in getattr(network, "peft_config", {}):
        raise LoraFileError(f"adapter_name={name!r} is in use already; give {lora.name} another name.")
    if any(parameter.is_meta for layer in parts for parameter in layers[layer].parameters()):
        raise LoraFileError(f"{lora.name}: the model's layers are offloaded one by one; load it before that.")
    with torch.random.fork_rng(devices=[]):  # values are drawn that the file replaces
        add_experts(network, list(parts), rank=rank, experts=experts, scale=scale, argument=argument, name=name)
    with torch.no_grad():
        for key, parameter in expert_tensors(network, name).items():
            layer, part = _split(key)
            parameter.copy_(parts[layer][part])
    network._hf_peft_config_loaded = True  # diffusers' own mark of a network with adapters
    return name


def _settings(lora: LoraFile) -> tuple[float, TimestepArgument]:
    """Return the scale of a file, and how its network is told the timestep.

    Raises:
        LoraFileError: its metadata don't say, or not as numbers.
    """
    try:
        said = json.loads(lora.metadata[METADATA])
        timestep = said["timestep"]
        scale, factor, offset = float(said["scale"]), float(timestep["factor"]), float(timestep["offset"])
        name = timestep["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise LoraFileError(
            f"{lora.name} is TD-LoRA, but its metadata {METADATA!r} are lost or damaged: {error!r}. "
            "Take the file as `tessera train-lora` wrote it."
        ) from error
    if not isinstance(name, str) or factor == 0 or not torch.tensor([scale, factor, offset]).isfinite().all():
        raise LoraFileError(
            f"{lora.name}: its metadata say {said}, expected a scale, and a timestep with a name, a factor that isn't "
            "0 and an offset."
        )
    return scale, TimestepArgument(name, factor, offset)


def _split(key: str) -> tuple[str, str]:
    """Split a key into the name of its layer and what part of the adapter it is; no part for keys of another kind."""
    found = re.fullmatch(r"(.+)\.(" + "|".join(map(re.escape, PARTS)) + ")", key.removeprefix(PREFIX))
    return (found[1], found[2]) if found else (key, "")


def _by_layer(lora: LoraFile, layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file by layer, in the order of the network, and by part.

    Raises:
        LoraMisfitError: keys without a place.
        LoraFileError: a layer lacks a part.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in lora.tensors.items():
        layer, part = _split(key)
        if not part or not isinstance(layers.get(layer), nn.Linear):
            unknown.append(key)
        else:
            found.setdefault(layer, {})[part] = tensor
    if unknown:
        kinds = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in layers})
        raise LoraMisfitError(
            f"{lora.name} doesn't fit this model: {len(unknown)} of {len(lora.tensors)} keys are of no linear layer of "
            f"it: {_some(unknown)}. It has {', '.join(kinds)}."
        )
    for layer, parts in found.items():
        missing = [part for part in PARTS if part not in parts]
        if missing:
            raise LoraFileError(f"{lora.name}: the layer {layer} lacks {', '.join(missing)}; the file is incomplete.")
    return {name: found[name] for name in layers if name in found}


def _sizes(
    lora: LoraFile, parts: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, nn.Module]
) -> tuple[int, int]:
    """Return the rank and the number of experts of a file, the same for all of its layers.

    Raises:
        LoraFileError: a tensor has another shape.
    """
    first = next(iter(parts.values()))
    rank, experts = len(first["timed_A.weight"]), len(first["timed_B.weight"])
    for name, held in parts.items():
        layer: Any = layers[name]
        expected = {
            "timed_A.weight": (rank, layer.in_features),
            "timed_B.weight": (experts, layer.out_features, rank),
            "timed_router.weight": (experts, FEATURES),
            "timed_router.bias": (experts,),
        }
        for part, tensor in held.items():
            if tuple(tensor.shape) != expected[part]:
                raise LoraFileError(
                    f"{lora.name}: {name}.{part} has the shape {tuple(tensor.shape)}, expected {expected[part]}. Was "
                    "it trained on a model of another size?"
                )
    return rank, experts


def _some(keys: list[str]) -> str:
    return ", ".join(sorted(keys)[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
