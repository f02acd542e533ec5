"""How the model in a folder is quantized, as its files tell before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit.runtime.json_files import read_object

INDEX, CONFIG = "model_index.json", "config.json"
LONGEST = 40
"""Letters of a name that is shown; configurations come from strangers."""


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How a saved model is quantized.

    Attributes:
        bits: formats, such as "w4a8"; the name of the method where it isn't ours.
        recipe: name of the recipe; empty where the method isn't ours.
        components: that are quantized.
        nbytes: of all weight files of the model.
    """

    bits: str
    recipe: str
    components: tuple[str, ...]
    nbytes: int


def quantization_in(folder: Path) -> StoredQuantization | None:
    """Return how the model in a folder is quantized; None if it isn't.

    Args:
        folder: of a saved pipeline.

    Raises:
        OSError: a file can't be read.
        ValueError: one is damaged.
    """
    if not (folder / INDEX).is_file():
        return None
    found: dict[str, Mapping[str, Any]] = {}
    names = [name for name, entry in read_object(folder / INDEX).items() if isinstance(entry, list)]
    for name in names:
        file = folder / Path(name).name / CONFIG
        config = read_object(file).get("quantization_config") if file.is_file() else None
        if isinstance(config, Mapping):
            found[name] = config
    if not found:
        return None
    first = next((one for name, one in found.items() if name.startswith("transformer")), next(iter(found.values())))
    method = str(first.get("quant_method", "quantized"))
    bits, recipe = first.get("bits"), first.get("recipe")
    is_ours = method == "tessera" and isinstance(bits, str) and isinstance(recipe, str)
    sizes = [file.stat().st_size for name in names for file in (folder / Path(name).name).glob("*.safetensors")]
    return StoredQuantization(
        str(bits if is_ours else method)[:LONGEST], str(recipe)[:LONGEST] if is_ours else "", tuple(found), sum(sizes)
    )
