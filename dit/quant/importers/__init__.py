"""Quantized checkpoints of other libraries, read into `QuantLinear` layers that run on any device.

Names are imported on first use.

Example:
    >>> from dit.quant.importers import import_quantized, read_checkpoint
    >>> checkpoint = read_checkpoint("svdq-int4_r32-model.safetensors")
    >>> import_quantized(network, checkpoint.tensors, checkpoint.config, metadata=checkpoint.metadata)
    >>> network.save_pretrained("model-int4")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit.quant.importers.contract import Checkpoint
    from dit.quant.importers.files import load_quantized, read_checkpoint
    from dit.quant.importers.importing import import_quantized, importer_names

__all__ = ["Checkpoint", "import_quantized", "importer_names", "load_quantized", "read_checkpoint"]

_MODULE_OF = {
    "Checkpoint": "dit.quant.importers.contract",
    "import_quantized": "dit.quant.importers.importing",
    "importer_names": "dit.quant.importers.importing",
    "load_quantized": "dit.quant.importers.files",
    "read_checkpoint": "dit.quant.importers.files",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dit.quant.importers' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access is a plain look-up
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
