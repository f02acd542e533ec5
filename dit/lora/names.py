"""Names of layers in LoRA files: from what a file writes to diffusers' layers, and to those of the original code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dit.lora.files import LoraFileError
from dit.lora.fusing import fuse, split
from dit.lora.layers import LoraLayer
from dit.runtime.families import FAMILIES
from dit.runtime.families.layer_names.own import NEXT_SCALE
from dit.runtime.families.layer_names.rule import LayerNames

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
"""What may stand before the name of a layer, one or several."""

FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""What stands before the name of a layer in which dots are underscores."""

RULES: dict[str, tuple[LayerNames, ...]] = {
    **{row.name: row.layers for row in FAMILIES},
    "next_scale": NEXT_SCALE,  # has no row in the table, because a row tells what a denoising call means
}
"""Family -> its layers."""


def bare_name(written: str) -> tuple[str, bool]:
    """Return a layer's name without prefixes, and whether it has underscores for dots."""
    for prefix in FLAT_PREFIXES:
        if written.startswith(prefix):
            return written.removeprefix(prefix), True
    name = written
    while True:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return name, False
        name = name.removeprefix(prefix)


def to_diffusers(rules: Sequence[LayerNames], name: str, flat: bool, layer: LoraLayer) -> dict[str, LoraLayer] | None:
    """Return what a layer's LoRA is in diffusers' layers.

    Args:
        rules: of the family.
        name: diffusers' or the original, without prefix.
        flat: it has underscores for dots.
        layer: its LoRA.

    Returns:
        Name -> LoRA; None if no layer of the family has that name.

    Raises:
        LoraFileError: a fused layer's rows are not those of its parts.
    """
    fitting = [rule for rule in rules if rule.row_ratio in (None, layer.ratio)]
    for rule in fitting:
        found = rule.match_part(name, flat)
        if found is not None:
            return {_numbered(rule.parts[found[0]], found[1]): layer}
    for rule in fitting:
        number = rule.match_original(name, flat)
        if number is not None:
            parts = zip(rule.parts, split(layer, rule), strict=True)
            return {_numbered(part, number): piece for part, piece in parts if piece is not None}
    return None


def to_original(rules: Sequence[LayerNames], layers: Mapping[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Return a LoRA in the layers of the original code.

    Args:
        rules: of the family.
        layers: by diffusers' names.

    Raises:
        LoraFileError: a layer has no original name, or its fused layer can't be made.
    """
    grouped: dict[tuple[LayerNames, str], list[LoraLayer | None]] = {}
    nameless = []
    for name, layer in layers.items():
        rule, index, number = _rule_of(rules, name, layer)
        if rule is None or rule.original is None:
            nameless.append(name)
            continue
        grouped.setdefault((rule, number), [None] * len(rule.parts))[index] = layer
    if nameless:
        raise LoraFileError(
            f"{len(nameless)} layers have no name in the original code that is known here: "
            f"{', '.join(sorted(nameless)[:8])}{', ...' if len(nameless) > 8 else ''}. Convert to a dialect with "
            "diffusers' names (diffusers, peft, onetrainer) instead."
        )
    written = {}
    for (rule, number), parts in grouped.items():
        name = _numbered(str(rule.original), number)
        written[name] = fuse(parts, rule, name)
    return written


def _rule_of(rules: Sequence[LayerNames], name: str, layer: LoraLayer) -> tuple[LayerNames | None, int, str]:
    """Return the rule of a diffusers layer, which part of it the layer is, and the number of its block."""
    for rule in rules:
        found = rule.match_part(name, flat=False) if rule.row_ratio in (None, layer.ratio) else None
        if found is not None:
            return rule, *found
    return None, 0, ""


def _numbered(template: str, number: str) -> str:
    return template.replace("#", number)
