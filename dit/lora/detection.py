"""Which family a LoRA file is for, where the names of its layers leave a choice."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dit.lora.files import LoraFile, LoraFileError
from dit.lora.layers import LoraLayer
from dit.runtime.families import FAMILIES

ROWS = {row.name: row for row in FAMILIES}

HINT_KEYS = ("lora_family", "modelspec.architecture", "ss_base_model_version")
"""Metadata that name the model: ours, and those of kohya's trainers, OneTrainer and ai-toolkit."""

HINTS: tuple[tuple[str, str], ...] = (
    ("flux2", "flux2"),
    ("flux1", "flux"),
    ("hunyuanvideo", "hunyuan_video"),
    ("sd35", "sd3"),
    ("sd3", "sd3"),
    ("stablediffusion3", "sd3"),
    ("qwenimage", "qwen_image"),
    ("zimage", "z_image"),
    ("lumina2", "lumina2"),
    ("luminaimage2", "lumina2"),
    ("pixart", "pixart"),
    ("sana", "sana"),
    ("cogvideox", "cogvideox"),
    ("wan21", "wan"),
    ("wan22", "wan"),
    ("ltxv", "ltx"),
    ("mochi", "mochi"),
)
"""Beginnings of a model's name in metadata, letters and digits only -> family."""


def choose(
    lora: LoraFile, fits: Mapping[str, Mapping[str, LoraLayer]], written: Callable[[str], dict[str, Tensor]]
) -> tuple[str, bool]:
    """Choose among the families that a file's names fit.

    In turn: what the metadata say, the number of blocks of the published networks, and whether it matters at all.

    Args:
        lora: the file.
        fits: family -> its layers by diffusers' names; at least one.
        written: makes of a family what would be written.

    Returns:
        The family, and whether it is the only one that it can be; if not, all give the same file.

    Raises:
        LoraFileError: several fit, and they would give different files.
    """
    names = list(fits)
    if len(names) == 1:
        return names[0], True
    told = _told(lora)
    if told is not None and told in fits:
        return told, True
    deep = [name for name in names if _has_published_depth(name, fits[name])]
    if len(deep) == 1:
        return deep[0], True
    if _all_same(names, written):
        return names[0], False
    raise LoraFileError(
        f"{lora.name} fits several families ({', '.join(names)}), and its layers are called differently in them. Say "
        "which one it is: family=... in Python, --family on the command line."
    )


def _told(lora: LoraFile) -> str | None:
    """Return the family that the metadata name; None if they don't."""
    for key in HINT_KEYS:
        value = str(lora.metadata.get(key, ""))
        if value in ROWS or value == "next_scale":
            return value
        plain = re.sub(r"[^a-z0-9]", "", value.lower())
        found = next((family for start, family in HINTS if plain.startswith(start)), None)
        if found is not None:
            return found
    return None


def _has_published_depth(family: str, layers: Mapping[str, LoraLayer]) -> bool:
    """Return whether a file reaches exactly to the last block of a published network of a family."""
    row = ROWS.get(family)
    if row is None:
        return False
    counts = [_count(layers, one.path) for one in row.block_lists if not one.refiner]
    return any(counts) and any(
        all(count in (0, size) for count, size in zip(counts, depth, strict=True)) for depth in row.depths
    )


def _count(layers: Mapping[str, LoraLayer], path: str) -> int:
    """Return one more than the last number of a list of blocks; 0 without any."""
    found = (re.match(re.escape(path) + r"\.(\d+)\.", name) for name in layers)
    return max((int(match.group(1)) + 1 for match in found if match is not None), default=0)


def _all_same(names: list[str], written: Callable[[str], dict[str, Tensor]]) -> bool:
    """Return whether all families give the same file."""
    try:
        first, *others = (written(name) for name in names)
    except LoraFileError:
        return False
    return all(
        other.keys() == first.keys() and all(torch.equal(other[key], first[key]) for key in first) for other in others
    )
