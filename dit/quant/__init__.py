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
    from dit.quant.mixed_precision import plan_precision
    from dit.quant.precision_plan import MixedPrecisionPlan
    from dit.quant.quantize import QuantizationReport, quantize_
    from dit.quant.recipes import recipe, recipe_names
    from dit.quant.scheme import Scheme
    from dit.quant.sensitivity_measure import measure_sensitivity

__all__ = [
    "Calibration",
    "CalibrationObserver",
    "MixedPrecisionPlan",
    "QuantLinear",
    "QuantizationReport",
    "Scheme",
    "TesseraQuantConfig",
    "calibrate",
    "measure_sensitivity",
    "plan_precision",
    "quantize_",
    "recipe",
    "recipe_names",
]

_MODULE_OF = {
    "Calibration": "dit.quant.calibration",
    "CalibrationObserver": "dit.quant.calibration",
    "MixedPrecisionPlan": "dit.quant.precision_plan",
    "QuantLinear": "dit.quant.linear",
    "QuantizationReport": "dit.quant.quantize",
    "Scheme": "dit.quant.scheme",
    "TesseraQuantConfig": "dit.quant.diffusers_config",
    "calibrate": "dit.quant.calibration",
    "measure_sensitivity": "dit.quant.sensitivity_measure",
    "plan_precision": "dit.quant.mixed_precision",
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
