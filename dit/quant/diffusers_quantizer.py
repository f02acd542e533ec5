"""TesseraQuantizer: quantized layers in `from_pretrained` and `save_pretrained` of diffusers.

diffusers builds the network without memory, asks the quantizer to prepare it, and hands it the tensors of the files one
by one. Tensors of quantized layers are taken as they are in the files: diffusers has cast those that it passes on to
the dtype asked for, in which scales would lose digits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor

from dit.quant.diffusers_config import TesseraQuantConfig
from dit.quant.layer_plan import connect_layers
from dit.quant.linear import QuantLinear
from dit.quant.loading import (
    check_layers,
    check_names,
    plain_layer,
    planned_layers,
    put_empty_layers,
    put_layer,
    put_quantized,
    put_tensor,
    tensor_names,
)
from dit.quant.roles import network_name
from dit.quant.scheme import Scheme
from dit.quant.tensor_files import TensorFiles, UnmappedTensors
from dit.runtime.diffusers_compat import forget_config


class TesseraQuantizer(DiffusersQuantizer):
    """Loads quantized networks, or quantizes networks without calibration while they are loaded.

    diffusers makes it for each model; see `TesseraQuantConfig`.

    Args:
        quantization_config: how the model is, or is to be, quantized.
        **kwargs: `pre_quantized`, of diffusers.

    Raises:
        TypeError: the configuration is another class's.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not isinstance(quantization_config, TesseraQuantConfig):
            raise TypeError(f"quantization_config is a {type(quantization_config).__name__}, use a TesseraQuantConfig")
        # Without layers the configuration only says what is to be done, wherever it comes from.
        self.pre_quantized = self.pre_quantized and quantization_config.layers is not None
        self._layers: dict[str, Scheme] = {}
        self._tensors: set[str] = set()
        self._stored: list[str] = []
        self._files = TensorFiles()

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Keep the names of all tensors in the files, which `update_missing_keys` checks, and where they lie."""
        self._stored, self._files = list(loaded_keys), TensorFiles(checkpoint_files)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Have weights that diffusers casts read one by one, so that the files' pages take no memory beside them."""
        return UnmappedTensors(state_dict, self._files, self._tensors)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Prepare the layers of a network without memory."""
        if self.pre_quantized:
            self._layers = dict(self.quantization_config.layers)
            put_empty_layers(model, self._layers)
            self._tensors = set(tensor_names(self._layers, model))
        else:
            self._layers = planned_layers(model, self.quantization_config)
            self._tensors = {f"{name}.weight" for name in self._layers}

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse files without some of the quantized layers' tensors, or with those of other quantized layers.

        Raises:
            ValueError: see `dit.quant.loading.check_names`.
        """
        if self.pre_quantized:
            check_names(self._stored, self._layers, model, network_name(model))
        return missing_keys

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return whether a tensor belongs to a quantized layer."""
        return param_name in self._tensors

    def check_quantized_param_shape(
        self, param_name: str, current_param: Tensor, loaded_param: Tensor
    ) -> Literal[True]:
        """Accept any shape here: `create_quantized_param` knows what is wrong with it."""
        return True

    def create_quantized_param(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a stored tensor into its layer, or quantize the weight of a layer.

        Raises:
            ValueError: the tensor has another shape or dtype than the layer asks for, or can't be quantized.
        """
        stored = self._files.read(param_name)  # its own memory: see `dit.quant.tensor_files`
        if stored is None:
            stored = state_dict[param_name]
        if self.pre_quantized:
            put_tensor(model, param_name, stored, target_device)
        else:
            name = param_name.removesuffix(".weight")
            self._layers[name] = put_quantized(model, name, stored, self._layers[name], target_device)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check what was loaded, and write down what is quantized."""
        self._files = TensorFiles()
        if self.pre_quantized:
            check_layers(model, self._layers)
            connect_layers(model)
            return model
        plain = [name for name in self._layers if not isinstance(model.get_submodule(name), QuantLinear)]
        if plain:
            raise ValueError(f"{network_name(model)}: the weight files lack {plain[0]}.weight, so it isn't quantized")
        connect_layers(model)
        self.quantization_config = self.quantization_config.replace(layers=self._layers)
        model.register_to_config(quantization_config=self.quantization_config)
        return model

    def _dequantize(self, model: Any) -> Any:
        """Replace all quantized layers by plain ones, and forget that there were any."""
        dtype = next((one.dtype for one in model.parameters() if one.dtype in _PLAIN_DTYPES), torch.float32)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                put_layer(model, name, plain_layer(layer, dtype))
        forget_config(model, "quantization_config")
        return model

    @property
    def supports_parallel_loading(self) -> bool:
        """Several files at a time only fill layers; quantizing replaces them."""
        return self.pre_quantized

    @property
    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Quantized networks can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters can be trained on quantized layers, which have a gradient with respect to their input."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Quantized layers are one operator in compiled code."""
        return True


_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
