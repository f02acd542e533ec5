"""Quantized networks: formats, calibration, kernels and recipes, as diffusers loads and saves them.

Names are imported on first use, so that `import dit.quant` costs nothing.

Example:
    >>> from dit.quant import calibrate, quantize_
    >>> report = quantize_(pipe, "viditq", "w8a8", calibrate(pipe, ["a red apple", "a blue fish"]))
    >>> pipe.save_pretrained("stickers-w8a8")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit.quant.calibration import Calibration, CalibrationObserver, calibrate
    from dit.quant.diffusers_config import TesseraQuantConfig
    from dit.quant.linear import QuantLinear
    from dit.quant.quantize import QuantizationReport, quantize_
    from dit.quant.recipes import recipe, recipe_names
    from dit.quant.scheme import Scheme

__all__ = [
    "Calibration",
    "CalibrationObserver",
    "QuantLinear",
    "QuantizationReport",
    "Scheme",
    "TesseraQuantConfig",
    "calibrate",
    "quantize_",
    "recipe",
    "recipe_names",
]

_MODULE_OF = {
    "Calibration": "dit.quant.calibration",
    "CalibrationObserver": "dit.quant.calibration",
    "QuantLinear": "dit.quant.linear",
    "QuantizationReport": "dit.quant.quantize",
    "Scheme": "dit.quant.scheme",
    "TesseraQuantConfig": "dit.quant.diffusers_config",
    "calibrate": "dit.quant.calibration",
    "quantize_": "dit.quant.quantize",
    "recipe": "dit.quant.recipes",
    "recipe_names": "dit.quant.recipes",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dit.quant' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access is a plain look-up
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
