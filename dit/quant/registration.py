"""Make diffusers and transformers know the quantization method "tessera", without importing them before somebody does.

Both libraries look the class that loads a quantized checkpoint up in a dictionary of their module `quantizers.auto`, by
the `quant_method` in the checkpoint's config.json. `register_when_imported` fills these dictionaries in as soon as the
modules are imported: `import pipelines` alone costs nothing, and after it `from_pretrained` of either library loads our
checkpoints.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "tessera"
"""Name of the method in configurations."""
CONFIG_MODULE = "dit.quant.diffusers_config"
"""Where the class of the configuration is; calls `register_when_imported` at its end."""
CONFIGS, QUANTIZERS = "AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"
"""Dictionaries of `quantizers.auto` of both libraries."""


def register_when_imported() -> None:
    """Register the method with diffusers and transformers: now, or as soon as they are imported.

    Raises:
        ValueError: another package registered a method of this name.
    """
    for library, maker in (("diffusers", _diffusers_quantizer), ("transformers", _transformers_quantizer)):
        name = f"{library}.quantizers.auto"
        module = sys.modules.get(name)
        if module is not None and hasattr(module, CONFIGS) and hasattr(module, QUANTIZERS):
            _register(module, maker)
        elif not any(isinstance(one, _ImportWatcher) and one.name == name for one in sys.meta_path):
            sys.meta_path.insert(0, _ImportWatcher(name, lambda module, maker=maker: _register(module, maker)))


def _register(auto: ModuleType, maker: Callable[..., Any]) -> None:
    """Fill in the dictionaries of a library's module `quantizers.auto`."""
    if CONFIG_MODULE not in sys.modules:
        import_module(CONFIG_MODULE)
    config = getattr(sys.modules[CONFIG_MODULE], "TesseraQuantConfig", None)
    if config is None:
        return  # its module is being imported, and imported this one; it comes here again at its end
    for mapping, value in ((getattr(auto, CONFIGS), config), (getattr(auto, QUANTIZERS), maker)):
        present = mapping.setdefault(METHOD, value)
        if not present.__module__.startswith("dit.quant."):
            raise ValueError(
                f"{auto.__name__} has a quantization method {METHOD!r} of {present.__module__} already; checkpoints of "
                "tessera can't be loaded beside that package: uninstall it"
            )


def _diffusers_quantizer(config: Any, **kwargs: Any) -> Any:
    """Make diffusers' quantizer. Its module needs all of diffusers, so it is imported when a model is loaded."""
    return import_module("dit.quant.diffusers_quantizer").TesseraQuantizer(config, **kwargs)


def _transformers_quantizer(config: Any, **kwargs: Any) -> Any:
    """Make transformers' quantizer."""
    return import_module("dit.quant.transformers_quantizer").TesseraHfQuantizer(config, **kwargs)


class _ImportWatcher(MetaPathFinder):
    """Calls a function once after the first import of a module; takes itself out when the import begins."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.function = function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the module as it is found without this, and have the function called after it ran."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.function(module)

        loader.exec_module = exec_module
        return spec
