"""The dialects of LoRA files: how each writes a layer's name and its tensors.

| dialect      | start of keys                            | layers       | alpha                              |
|--------------|------------------------------------------|--------------|------------------------------------|
| `diffusers`  | transformer.LAYER.lora_A                 | diffusers'   | metadata `lora_adapter_metadata`   |
| `peft`       | base_model.model.LAYER.lora_A            | diffusers'   | adapter_config.json beside         |
| `comfyui`    | diffusion_model.LAYER.lora_A             | the original | LAYER.alpha, unless it is the rank |
| `kohya`      | lora_unet_LA_YER.lora_down               | the original | LA_YER.alpha                       |
| `onetrainer` | lora_transformer_LA_YER.lora_down        | diffusers'   | LA_YER.alpha                       |

LA_YER stands for a name with underscores for dots. Rows of a magnitude (DoRA) are `lora_magnitude_vector` or, beside
LAYER.alpha, `dora_scale`; a trained bias is `lora_B.bias` or `diff_b`, which holds it with the scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dit.lora.files import METADATA_KEY
from dit.lora.layers import LoraLayer, alpha_tensor
from dit.lora.peft_config import peft_config

DialectName = Literal["diffusers", "peft", "comfyui", "kohya", "onetrainer"]


@dataclass(frozen=True)
class Dialect:
    """How a dialect is written.

    Attributes:
        prefix: of all keys.
        original: layers have the names of the original code, fused ones are one layer.
        flat: dots of a layer's name are underscores.
        down: end of the key of the first factor.
        up: of the second.
        alpha: where it stands: in a configuration, beside each layer, or beside layers whose alpha is not the rank.
    """

    prefix: str
    original: bool
    flat: bool
    down: str
    up: str
    alpha: Literal["config", "always", "unless rank"]

    def tensors(self, layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
        """Return the tensors of a file.

        Args:
            layers: by the dialect's names, with dots and without prefix.
        """
        named: dict[str, Tensor] = {}
        for name, layer in layers.items():
            key = self.prefix + (name.replace(".", "_") if self.flat else name)
            named[f"{key}.{self.down}.weight"] = layer.down
            named[f"{key}.{self.up}.weight"] = layer.up
            if self.alpha == "config":
                named |= _peft_extras(key, layer)
            else:
                named |= _key_extras(key, layer)
                if self.alpha == "always" or layer.alpha != layer.rank:
                    named[f"{key}.alpha"] = alpha_tensor(layer.alpha)
        # Clones, because tensors that share memory cannot be saved as safetensors.
        return {key: tensor.detach().clone().contiguous() for key, tensor in named.items()}


DIALECTS: dict[str, Dialect] = {
    "diffusers": Dialect("transformer.", False, False, "lora_A", "lora_B", "config"),
    "peft": Dialect("base_model.model.", False, False, "lora_A", "lora_B", "config"),
    "comfyui": Dialect("diffusion_model.", True, False, "lora_A", "lora_B", "unless rank"),
    "kohya": Dialect("lora_unet_", True, True, "lora_down", "lora_up", "always"),
    "onetrainer": Dialect("lora_transformer_", False, True, "lora_down", "lora_up", "always"),
}


def _peft_extras(key: str, layer: LoraLayer) -> dict[str, Tensor]:
    """Return the bias and the magnitude as PEFT shapes them."""
    extras = {}
    if layer.bias is not None:
        extras[f"{key}.lora_B.bias"] = layer.bias
    if layer.magnitude is not None:
        kernel = layer.down.ndim - 2
        shaped = layer.magnitude.reshape(1, -1, *[1] * kernel) if kernel else layer.magnitude
        extras[f"{key}.lora_magnitude_vector"] = shaped
    return extras


def _key_extras(key: str, layer: LoraLayer) -> dict[str, Tensor]:
    """Return the bias as a whole difference and the magnitude as one column."""
    extras = {}
    if layer.bias is not None:
        extras[f"{key}.diff_b"] = (layer.bias.double() * layer.scale).to(layer.bias.dtype)
    if layer.magnitude is not None:
        extras[f"{key}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    return extras


def file_metadata(to: str, file: str, layers: Mapping[str, LoraLayer], names: list[str]) -> dict[str, str]:
    """Return the metadata that a dialect needs.

    Args:
        to: the dialect.
        file: name of the file, for messages.
        layers: by diffusers' names.
        names: of all layers of the family that those may be confused with.
    """
    if to != "diffusers":
        return {}
    config = {f"transformer.{key}": value for key, value in peft_config(file, layers, names).items()}
    return {METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def adapter_config(file: str, layers: Mapping[str, LoraLayer], names: list[str]) -> dict[str, Any]:
    """Return what PEFT's `adapter_config.json` holds; arguments as for `file_metadata`."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        **peft_config(file, layers, names),
    }
