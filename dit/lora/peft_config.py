"""PEFT's configuration of a LoRA: the rank and the alpha of every layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dit.lora.files import LoraFileError
from dit.lora.layers import LoraLayer


def peft_config(file: str, layers: Mapping[str, LoraLayer], names: Iterable[str] = ()) -> dict[str, Any]:
    """Make the arguments of PEFT's `LoraConfig`.

    Args:
        file: name of the file, for messages.
        layers: by diffusers' names.
        names: of all layers that the network may have; where one ends like a layer of the LoRA, `target_modules` is an
            expression for whole names instead of a list, whose entries PEFT takes for ends of names.

    Raises:
        LoraFileError: only some layers have a magnitude.
    """
    lengths = [name for name, layer in layers.items() if layer.magnitude is not None]
    if lengths and len(lengths) < len(layers):
        raise LoraFileError(
            f"{file}: only a part of its layers ({len(lengths)} of {len(layers)}) is DoRA, such as "
            f"{layers[lengths[0]].keys.get('magnitude', lengths[0])}; PEFT knows DoRA for all layers of a file or for "
            "none."
        )
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": _targets(layers, names),
        "use_rslora": False,
        "use_dora": bool(lengths),
        "lora_bias": any(layer.bias is not None for layer in layers.values()),
    }


def _targets(layers: Mapping[str, LoraLayer], names: Iterable[str]) -> list[str] | str:
    others = [name for name in names if name not in layers]
    if any(other.endswith("." + name) for other in others for name in layers):
        return "(" + "|".join(re.escape(name) for name in sorted(layers)) + ")"
    return sorted(layers)


def _commonest(values: Mapping[str, Any]) -> Any:
    listed = list(values.values())
    return max(sorted(set(listed)), key=listed.count)
