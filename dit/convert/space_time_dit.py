"""Published VDT and Latte checkpoints: their layouts as key maps, and whole models from them and back.

*Official* are the layouts of RERV/VDT (models.py) and Vchitect/Latte (models/latte.py): that of DiT with a stored table
of frame positions; a VDT block has an attention along time beside DiT's parts, and in a Latte every second block is
along time. *Ours* is `dit.models.space_time_dit.SpaceTimeDiT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit.convert.dit import POSITION_DRIFT, attention_rules, block_rules, ends_rules
from dit.convert.keymap import Drop, KeyMapError, Rename, Rule, affine, convert, inverse
from dit.convert.var import check_has, load_exactly
from dit.layers.positions import sincos_1d, sincos_2d
from dit.models.space_time_dit import PRESETS, SpaceTimeDiT

ARRANGEMENTS = {"vdt": "temporal_first", "latte": "alternating"}
"""The arrangement of each published family."""

FRAME_TABLES = {"temporal_first": "time_embed", "alternating": "temp_embed"}
"""How the families call the stored table of frame positions."""

LABELS, TEXT = "y_embedder.embedding_table.weight", "text_embedding_projection.1"


def official_rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return the map from the official layout to ours; `inverse` of it exports.

    Args:
        config: arguments of `SpaceTimeDiT`, all that shape its weights.
    """
    side, frames = config["sample_size"] // config["patch_size"], config["num_frames"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    frame_table = FRAME_TABLES[config["arrangement"]]
    rules: list[Rule] = [
        Drop("pos_embed", lambda: sincos_2d(side, side, width)[None], atol=POSITION_DRIFT),
        Drop(frame_table, lambda: sincos_1d(torch.arange(frames), width).float()[None], atol=POSITION_DRIFT),
        *ends_rules(),
    ]
    if config["num_classes"] is not None:
        rules.append(Rename(LABELS, "label_embed.table.weight"))
    if config["text_dim"] is not None:
        rules += affine(Rename, TEXT, "text_embed.1")
    for i in range(config["num_layers"]):
        theirs, ours = f"blocks.{i}", f"transformer_blocks.{i}"
        along_time = config["arrangement"] == "alternating" and i % 2 == 1
        rules += block_rules(theirs, ours, "temporal_attn" if along_time else "attn")
        if config["arrangement"] == "temporal_first":
            rules += affine(Rename, f"{theirs}.temporal_norm1", f"{ours}.temporal_norm")
            rules += attention_rules(f"{theirs}.temporal_attn", f"{ours}.temporal_attn")
            rules += affine(Rename, f"{theirs}.temporal_fc", f"{ours}.temporal_proj")
    return tuple(rules)


def infer_config(state: Mapping[str, Tensor], family: str, num_attention_heads: int | None = None) -> dict[str, Any]:
    """Read a configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout.
        family: "vdt" or "latte".
        num_attention_heads: shapes don't show it; None looks it up among the published sizes.

    Returns:
        Arguments of `SpaceTimeDiT`.

    Raises:
        KeyMapError: the state dict is not in the official layout of this family.
        ValueError: an unknown family; or the number of heads is not given and the size is not a published one.
    """
    if family not in ARRANGEMENTS:
        raise ValueError(f"family {family!r} is not known; use one of {', '.join(ARRANGEMENTS)}")
    arrangement = ARRANGEMENTS[family]
    other = next(name for name in FRAME_TABLES.values() if name != FRAME_TABLES[arrangement])
    if other in state:
        raise KeyMapError(f"{other} belongs to {'latte' if family == 'vdt' else 'vdt'}; use that family, not {family}")
    needed = ("x_embedder.proj.weight", "pos_embed", FRAME_TABLES[arrangement], "final_layer.linear.weight")
    check_has(state, (*needed, "blocks.0.mlp.fc1.weight"), "a VDT" if family == "vdt" else "a Latte")
    width, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    num_layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    heads = num_attention_heads or _published_heads(width, num_layers)
    return {
        "arrangement": arrangement,
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "num_frames": state[FRAME_TABLES[arrangement]].shape[1],
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": state["final_layer.linear.weight"].shape[0] // patch_size**2,
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "ff_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state[LABELS].shape[0] - 1 if LABELS in state else None,  # the last row is 'no class'
        "default_label": 0 if family == "vdt" else None,
        "text_dim": state[f"{TEXT}.weight"].shape[1] if f"{TEXT}.weight" in state else None,
    }


def _published_heads(width: int, num_layers: int) -> int:
    """Return the number of heads of the published size with this width and depth."""
    for preset in PRESETS.values():
        heads = preset["num_attention_heads"]
        if heads * preset["attention_head_dim"] == width and preset["num_layers"] == num_layers:
            return heads
    raise ValueError(
        f"width {width} with {num_layers} blocks is not a published size (S, B, L, XL); say num_attention_heads"
    )


def from_official(state: Mapping[str, Tensor], family: str, num_attention_heads: int | None = None) -> SpaceTimeDiT:
    """Return a model from an official state dict.

    Args:
        state: tensors in the layout of RERV/VDT or Vchitect/Latte.
        family: "vdt" or "latte".
        num_attention_heads: needed for sizes that were never published.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys, shapes or position tables don't fit the layout.
        ValueError: an unknown family, or an unknown number of heads.
    """
    config = infer_config(state, family, num_attention_heads)
    converted = convert(state, official_rules(config))
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = SpaceTimeDiT(**config)
    return load_exactly(model, converted)


def to_official(model: SpaceTimeDiT) -> dict[str, Tensor]:
    """Return the state dict of a model in the official layout of its family, bit for bit what `from_official` read.

    Only position tables that had drifted come back exact (see `dit.convert.dit.POSITION_DRIFT`).
    """
    state = convert(model.state_dict(), inverse(official_rules(model.config)))
    tables = ("pos_embed", FRAME_TABLES[model.config.arrangement])
    return {**state, **{name: state[name].to(model.dtype) for name in tables}}
