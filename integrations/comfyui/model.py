"""What a node hands to the next one: a description of a model, so that cached outputs of nodes never change.

ComfyUI keeps the outputs of nodes whose inputs are the same. A pipeline that nodes change in place would keep what a
node did after it is unplugged; a description doesn't, and what it describes is put on for one call.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apps.service.engine import Engine

KEPT = 2
"""Models that stay in memory."""


@dataclass(frozen=True)
class Model:
    """A model and what is put on it.

    Attributes:
        source: built-in name, folder, single file or hub id.
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16" or "float16".
        offload: what of it waits on the CPU, see `pipelines.load_pipeline`.
        quantization: formats of weights and activations; "none" for as they are.
        loras: files with their weights, the first one put on first.
        profile: named setting of speed; "" for none.
        acceleration: JSON of ways to be faster; "" for none.
    """

    source: str
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    quantization: str = "none"
    loras: tuple[tuple[str, float], ...] = ()
    profile: str = ""
    acceleration: str = ""

    def with_lora(self, file: str, weight: float) -> Model:
        """Return the model with another LoRA file."""
        return replace(self, loras=(*self.loras, (file, weight)))

    def with_speed(self, profile: str, acceleration: str) -> Model:
        """Return the model with another setting of speed, in place of the one that it had."""
        return replace(self, profile=profile, acceleration=acceleration)


def lora_name(file: str) -> str:
    """Return the name that requests have for a LoRA file: that of the file, and what tells it from others."""
    stem = re.sub(r"[^\w.-]+", "_", Path(file).stem)[:80]
    return f"{stem}-{hashlib.sha256(file.encode()).hexdigest()[:8]}"


class Engines:
    """The engines behind the nodes, one for each way to load a model; the least recently used one is closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: OrderedDict[tuple[str, ...], Engine] = OrderedDict()

    def of(self, model: Model) -> Engine:
        """Return the engine of a model; it loads the model with the first request.

        Raises:
            ValueError: the name, the device or the data type can't be had.
        """
        from apps.service.engine import Engine
        from apps.service.limits import ServerLimits
        from apps.service.model_pool import check_sources

        key = (model.source, model.device, model.dtype, model.offload)
        with self._lock:
            engine = self._engines.get(key)
            if engine is None:
                check_sources([model.source])
                engine = Engine(
                    {"model": model.source},
                    None,
                    model.device,
                    model.dtype,
                    model.offload,
                    server_limits=ServerLimits(loaded_models=1),
                )
                self._engines[key] = engine
            self._engines.move_to_end(key)
            while len(self._engines) > KEPT:
                _, oldest = self._engines.popitem(last=False)
                oldest.close()
        for file, _ in model.loras:
            name = lora_name(file)
            engine.lora_files.put(name, {name: Path(file)}, OWNER)
        return engine

    def close(self) -> None:
        """Close all engines."""
        with self._lock:
            while self._engines:
                self._engines.popitem()[1].close()


OWNER = "local"
"""Whose requests those of the nodes are."""
ENGINES = Engines()
"""Of this process of ComfyUI."""
