"""Networks quantized in memory: what `save_pretrained` needs to know of them."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from dit.quant.diffusers_config import TesseraQuantConfig
from dit.quant.linear import QuantLinear
from dit.runtime.diffusers_compat import forget_config
from dit.runtime.state import unwrap


def mark_quantized(model: nn.Module, config: TesseraQuantConfig) -> bool:
    """Have `save_pretrained` write a network that was quantized in memory, so that `from_pretrained` reads it.

    Args:
        model: with quantized layers in place, wrapped or not.
        config: with the schemes of all of them.

    Returns:
        Whether the network can be saved that way; others than those of diffusers and transformers can't.

    Raises:
        ValueError: the configuration names other layers than those that are quantized.
    """
    bare: Any = unwrap(model)
    quantized = {name for name, layer in bare.named_modules() if isinstance(layer, QuantLinear)}
    if quantized != set(config.layers or ()):
        odd = sorted(quantized ^ set(config.layers or ()))
        raise ValueError(
            f"the layers of the configuration are not the {len(quantized)} quantized ones; {odd[0]} is only in one"
        )
    if isinstance(bare, ModelMixin):
        bare.hf_quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=True)
        bare.register_to_config(quantization_config=config)
    elif isinstance(bare, PreTrainedModel):
        bare.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
        bare.config.quantization_config = config
    else:
        return False
    vars(bare).update(is_quantized=True, quantization_method=config.quant_method)
    return True


def unmark_quantized(model: nn.Module) -> None:
    """Forget what `mark_quantized` noted, when all layers are plain again.

    Args:
        model: wrapped or not.
    """
    bare: Any = unwrap(model)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(bare).pop(name, None)
    if isinstance(bare, ModelMixin):
        forget_config(bare, "quantization_config")
    elif isinstance(bare, PreTrainedModel):
        vars(bare.config).pop("quantization_config", None)
