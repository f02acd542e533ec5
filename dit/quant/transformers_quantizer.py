"""TesseraHfQuantizer: quantized text encoders in `from_pretrained` and `save_pretrained` of transformers."""

from __future__ import annotations

from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from dit.quant.diffusers_config import TesseraQuantConfig
from dit.quant.layer_plan import connect_layers
from dit.quant.linear import QuantLinear
from dit.quant.loading import (
    check_layers,
    check_names,
    own_tensors,
    plain_layer,
    planned_layers,
    put_empty_layers,
    put_layer,
    put_quantized,
    tensor_names,
)
from dit.quant.roles import network_name
from dit.quant.scheme import Scheme
from dit.quant.tensor_files import TensorFiles


class TesseraHfQuantizer(HfQuantizer):
    """Loads quantized models of transformers, or quantizes them without calibration while they are loaded.

    Weights that are quantized while they are loaded are in the dtype asked for: transformers casts them before.

    Args:
        quantization_config: how the model is, or is to be, quantized.
        **kwargs: `pre_quantized`, of transformers.

    Raises:
        TypeError: the configuration is another class's.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not isinstance(quantization_config, TesseraQuantConfig):
            raise TypeError(f"quantization_config is a {type(quantization_config).__name__}, use a TesseraQuantConfig")
        self.pre_quantized = self.pre_quantized and quantization_config.layers is not None
        self.layers: dict[str, Scheme] = dict(quantization_config.layers or {})
        self._tensors: set[str] = set()
        self._files = TensorFiles()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Prepare the layers of a model without memory."""
        if not self.pre_quantized:
            self.layers = planned_layers(model, self.quantization_config)
            self._tensors = {f"{name}.weight" for name in self.layers}
            return
        self.layers = dict(self.quantization_config.layers)
        put_empty_layers(model, self.layers)
        self._tensors = set(tensor_names(self.layers, model))
        files = kwargs.get("checkpoint_files") or []
        self._files = TensorFiles(files)
        if files and all(str(file).endswith(".safetensors") for file in files):
            check_names(_names(files, model.base_model_prefix, self._tensors), self.layers, model, network_name(model))

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Leave tensors of quantized layers in the dtype of the file."""
        if set(converter.target_patterns) & self._tensors:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a tensor is the weight of a layer that is to be quantized."""
        return not self.pre_quantized and param_name in self._tensors

    def get_quantize_ops(self) -> ConversionOps:
        """Return what quantizes a weight."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check what was loaded, and write down what is quantized."""
        plain = [name for name in self.layers if not isinstance(model.get_submodule(name), QuantLinear)]
        if plain:
            raise ValueError(f"{network_name(model)}: the weight files lack {plain[0]}.weight, so it isn't quantized")
        own_tensors(model, self.layers, self._files)
        self._files = TensorFiles()
        check_layers(model, self.layers)
        connect_layers(model)
        if not self.pre_quantized:
            self.quantization_config = self.quantization_config.replace(layers=self.layers)
            model.config.quantization_config = self.quantization_config
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Replace all quantized layers by plain ones."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                put_layer(model, name, plain_layer(layer, dtype or model.dtype))
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters can be trained on quantized layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Quantized layers are one operator in compiled code."""
        return True


class _Quantize(ConversionOps):
    """Quantizes the weight of a layer and puts a quantized layer in its place."""

    def __init__(self, quantizer: TesseraHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Take one weight; nothing is left to be set."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        layers = self.quantizer.layers
        layers[name] = put_quantized(model, name, weight, layers[name], weight.device)
        layer: Any = model.get_submodule(name)
        for tensor in layer.stored.values():
            tensor._is_hf_initialized = True
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def _names(files: list[Any], prefix: str, wanted: set[str]) -> set[str]:
    """Return the names of the tensors in safetensors files, with or without the prefix of a model with a head."""
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored |= set(opened.keys())
    within = {name.removeprefix(f"{prefix}.") for name in stored} | {f"{prefix}.{name}" for name in stored}
    return stored | (within & wanted)
