"""LoHa (arXiv 2108.06098) and LoKr (2309.14859) in the layout of PEFT, fitted to one network.

Their factors are no pair, and a layer may have from two to four of them: which ones and of what shape follows from the
settings. So PEFT is asked for the adapters of a network without weights first, and a file has to fill exactly these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import peft
import torch
from diffusers.utils import get_adapter_name
from torch import Tensor, nn

from dit.lora.files import PEFT_PREFIX, SHOWN, LoraFile, LoraFileError, LoraMisfitError, check_values, other_kind
from dit.lora.layers import layer_setting
from pipelines.lora.files import adaptable_layers

KINDS: dict[str, tuple[type[Any], str]] = {
    "LOHA": (peft.LoHaConfig, r"\.hada_\w+$"),
    "LOKR": (peft.LoKrConfig, r"\.lokr_\w+$"),
}
"""PEFT's name of a kind -> its configuration, and the ends of its keys."""

SETTINGS = ("decompose_both", "decompose_factor")
"""Settings that shapes depend on, beside ranks; those of training are left out."""


def is_lycoris(lora: LoraFile) -> bool:
    """Return whether PEFT's configuration beside a file says that it is LoHa or LoKr, and its keys don't deny it."""
    return lora.config.get("peft_type") in KINDS and other_kind(lora.tensors) is not None


def put_lycoris(network: Any, lora: LoraFile, adapter_name: str | None = None) -> str:
    """Put a LoHa or LoKr on a network; all of it fits, or nothing is changed.

    Args:
        network: with the methods of diffusers' `PeftAdapterMixin`.
        lora: for which `is_lycoris`.
        adapter_name: for `set_adapters`, `delete_adapters`; None makes one up.

    Returns:
        The name of the adapter.

    Raises:
        LoraMisfitError: keys that have no place in the network, or places that the file leaves empty.
        LoraFileError: damaged, of another size, or beside adapters that it can't stand beside.
    """
    check_values(lora)
    check_company(network, lora.name, lora.config["peft_type"])
    layers = adaptable_layers(network)
    tensors = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in lora.tensors.items()}
    targets = {name: layers[name] for name in _adapted(lora, tensors, layers)}
    config = _config(lora, list(targets))
    _check_places(lora, tensors, _expected(config, targets))
    name = get_adapter_name(network) if adapter_name is None else adapter_name
    if name in getattr(network, "peft_config", {}):
        raise LoraFileError(f"adapter_name={name!r} is in use already; give {lora.name} another name.")
    if any(parameter.is_meta for layer in targets.values() for parameter in layer.parameters()):
        raise LoraFileError(f"{lora.name}: the model's layers are offloaded one by one; load it before that.")
    with torch.random.fork_rng(devices=[]):  # PEFT draws values that the file replaces
        peft.inject_adapter_in_model(config, network, adapter_name=name)
    result = peft.set_peft_model_state_dict(network, tensors, adapter_name=name)
    if result.unexpected_keys:
        raise RuntimeError(f"PEFT found no place for {result.unexpected_keys[:SHOWN]} in a network that it prepared")
    network._hf_peft_config_loaded = True  # diffusers' own mark of a network with adapters
    return name


def _adapted(lora: LoraFile, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the layers of a network that a file adapts, in the order of the network.

    The file's own `target_modules` are not asked: an expression from a file could keep the matcher busy for years.
    """
    ends = KINDS[lora.config["peft_type"]][1]
    named = {key: re.sub(ends, "", key) if re.search(ends, key) else "" for key in tensors}
    unknown = [key for key, name in named.items() if not isinstance(layers.get(name), nn.Linear)]
    if unknown:
        kinds = sorted(
            {re.sub(r"\.\d+(?=\.)", ".N", name) for name, one in layers.items() if isinstance(one, nn.Linear)}
        )
        raise LoraMisfitError(
            f"{lora.name} doesn't fit this model: {len(unknown)} of {len(tensors)} keys are of no linear layer of it: "
            f"{_some(unknown)}. It has {', '.join(kinds)}."
        )
    wanted = set(named.values())
    return [name for name in layers if name in wanted]


def _config(lora: LoraFile, targets: list[str]) -> Any:
    """Return PEFT's configuration, with the rank and the alpha of each layer.

    Raises:
        LoraFileError: the file's configuration lacks the rank, or a setting is of another type.
    """
    ranks = {name: layer_setting(lora, name, "rank_pattern", "r") for name in targets}
    alphas = {name: layer_setting(lora, name, "alpha_pattern", "alpha") for name in targets}
    lacking = "r" if None in ranks.values() else "alpha" if None in alphas.values() else None
    if lacking is not None:
        raise LoraFileError(f"{lora.name}: its adapter_config.json has no {lacking}, which its scale depends on.")
    values = {name: int(rank) for name, rank in ranks.items() if rank is not None}
    if min(values.values()) < 1:
        raise LoraFileError(f"{lora.name}: its adapter_config.json says r={min(values.values())}, expected at least 1.")
    own = {name: lora.config[name] for name in SETTINGS if lora.config.get(name) is not None}
    if any(not isinstance(value, int) for value in own.values()):
        raise LoraFileError(f"{lora.name}: its adapter_config.json says {own}, expected whole numbers or true, false.")
    rank, alpha = values[targets[0]], alphas[targets[0]]
    kind = KINDS[lora.config["peft_type"]][0]
    return kind(
        target_modules="(" + "|".join(map(re.escape, targets)) + ")",  # PEFT takes names in a list for ends of names
        r=rank,
        alpha=alpha,
        rank_pattern={f"^{re.escape(name)}": value for name, value in values.items() if value != rank},
        alpha_pattern={f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        **own,
    )


def _expected(config: Any, layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes that PEFT gives the adapters of linear layers, found out without their weights."""
    skeleton = nn.Module()
    for name, layer in layers.items():
        parent = skeleton
        *path, last = name.split(".")
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        weight: Any = layer.weight
        parent.add_module(last, nn.Linear(layer.in_features, layer.out_features, device="meta", dtype=weight.dtype))  # type: ignore[arg-type]
    peft.inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
    found = peft.get_peft_model_state_dict(skeleton)
    return {key: tuple(tensor.shape) for key, tensor in found.items()}


def _check_places(lora: LoraFile, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a file that has more or less than PEFT's adapters of that configuration, or of other shapes."""
    extra, missing = [key for key in tensors if key not in expected], [key for key in expected if key not in tensors]
    if extra or missing:
        parts = [f"{len(extra)} keys have no place: {_some(extra)}"] if extra else []
        parts += [f"{len(missing)} are missing: {_some(missing)}"] if missing else []
        raise LoraMisfitError(f"{lora.name} doesn't fit its adapter_config.json: {'; '.join(parts)}.")
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != expected[key]:
            raise LoraFileError(
                f"{lora.name}: {key} has the shape {tuple(tensor.shape)}, expected {expected[key]}. Was it trained on "
                "a model of another size?"
            )


def check_company(network: Any, file: str, kind: str) -> None:
    """Refuse adapters of a kind that can't stand beside those a network has: PEFT's layers hold one kind.

    Args:
        network: perhaps with adapters.
        file: name of the file, for messages.
        kind: of the file, PEFT's name.

    Raises:
        LoraFileError: the network has others.
    """
    held = getattr(network, "peft_config", {}).values()
    others = sorted({str(getattr(one.peft_type, "value", one.peft_type)) for one in held} - {kind})
    if others:
        raise LoraFileError(
            f"{file} is {kind}, the model has adapters of the kind {', '.join(others)}, which it can't stand beside: "
            "take those off with pipelines.unload_lora(pipe)."
        )


def _some(keys: list[str]) -> str:
    return ", ".join(sorted(keys)[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
