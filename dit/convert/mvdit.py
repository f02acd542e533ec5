"""Published MVDiT checkpoints: their layout as a key map, and whole models from them and back.

*Official* is the layout of NJU-PCALab/OpenVid-1M (openvid/models/mvdit/mvdit.py). *Ours* is `dit.models.mvdit.MVDiT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit.convert.dit import attention_rules
from dit.convert.keymap import Drop, Rename, Rule, Split, affine, convert, inverse
from dit.convert.var import check_has, load_exactly
from dit.layers.positions import sincos_1d, sincos_2d
from dit.models.mvdit import MVDiT

PLACES, TIMES = "pos_embed", "pos_embed_temporal"
"""Tables of positions; the official loader leaves them out of a file, and so may the file."""

_HEAD_DIM = 72  # of the released model

_TABLES = {
    "scale_shift_table": "scale_shift_table",
    "scale_shift_table_y": "context_table",
    "scale_shift_table_temp": "temporal_table",
    "scale_shift_table_y_temp": "temporal_context_table",
}

_PROJECTIONS = {
    "t_block": "adaln_single",
    "t_block_y": "adaln_context",
    "t_block_temp": "adaln_temporal",
    "t_block_y_temp": "adaln_temporal_context",
}


def official_rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return the map from the official layout to ours; `inverse` of it exports.

    Args:
        config: arguments of `MVDiT`, all that shape its weights.
    """
    side, frames = config["sample_size"] // config["patch_size"], config["num_frames"] // config["patch_size_t"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    times = torch.arange(frames) / config["time_scale"]
    rules: list[Rule] = [
        Drop(PLACES, lambda: sincos_2d(side, side, width, config["space_scale"])[None]),
        Drop(TIMES, lambda: sincos_1d(times, width).float()[None]),
        *affine(Rename, "x_embedder.proj", "patch_embed"),
        *affine(Rename, "t_embedder.mlp.0", "time_embed.linear_1"),
        *affine(Rename, "t_embedder.mlp.2", "time_embed.linear_2"),
        *affine(Rename, "y_embedder.y_proj.fc1", "text_projection.linear_1"),
        *affine(Rename, "y_embedder.y_proj.fc2", "text_projection.linear_2"),
        Rename("y_embedder.y_embedding", "null_text"),
        *affine(Rename, "final_layer.linear", "proj_out"),
        Rename("final_layer.scale_shift_table", "scale_shift_table"),
    ]
    for theirs, ours in _PROJECTIONS.items():
        rules += affine(Rename, f"{theirs}.1", f"{ours}.linear")
    for i in range(config["num_layers"]):
        rules += _block_rules(f"blocks.{i}", f"transformer_blocks.{i}")
    return tuple(rules)


def _block_rules(theirs: str, ours: str) -> list[Rule]:
    """Return the rules of one block."""
    rules: list[Rule] = [Rename(f"{theirs}.{one}", f"{ours}.{other}") for one, other in _TABLES.items()]
    rules += attention_rules(f"{theirs}.attn", f"{ours}.attn")
    rules += attention_rules(f"{theirs}.attn_temp", f"{ours}.temporal_attn")
    keys_and_values = (f"{ours}.text_attn.to_k", f"{ours}.text_attn.to_v")
    rules += affine(Rename, f"{theirs}.cross_attn.q_linear", f"{ours}.text_attn.to_q")
    rules += affine(Split, f"{theirs}.cross_attn.kv_linear", keys_and_values)
    rules += affine(Rename, f"{theirs}.cross_attn.proj", f"{ours}.text_attn.to_out.0")
    for one, other in (("mlp", "ff"), ("mlp_y", "ff_context")):
        rules += affine(Rename, f"{theirs}.{one}.fc1", f"{ours}.{other}.net.0.proj")
        rules += affine(Rename, f"{theirs}.{one}.fc2", f"{ours}.{other}.net.2")
    return rules


def infer_config(
    state: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    space_scale: float = 1.0,
    time_scale: float = 1.0,
) -> dict[str, Any]:
    """Read a configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout; without stored positions the released size is taken.
        num_attention_heads: shapes don't show it; None takes heads of the released width, 72.
        space_scale: of the positions, which shapes don't show either.
        time_scale: likewise.

    Returns:
        Arguments of `MVDiT`.

    Raises:
        KeyMapError: the state dict is not in the official layout.
        ValueError: the number of heads is not given and heads of 72 don't fit.
    """
    needed = (
        "x_embedder.proj.weight",
        "y_embedder.y_embedding",
        "final_layer.linear.weight",
        "t_block_y_temp.1.weight",
    )
    check_has(state, (*needed, "blocks.0.mlp.fc1.weight"), "an MVDiT")
    width, in_channels, patch_size_t, patch_size, _ = state["x_embedder.proj.weight"].shape
    if num_attention_heads is None and width % _HEAD_DIM:
        raise ValueError(f"width {width} is not that of the released model (16 heads of 72); say num_attention_heads")
    heads = num_attention_heads or width // _HEAD_DIM
    length, text_dim = state["y_embedder.y_embedding"].shape
    return {
        "sample_size": math.isqrt(state[PLACES].shape[1]) * patch_size if PLACES in state else 64,
        "num_frames": state[TIMES].shape[1] * patch_size_t if TIMES in state else 16,
        "patch_size": patch_size,
        "patch_size_t": patch_size_t,
        "in_channels": in_channels,
        "out_channels": state["final_layer.linear.weight"].shape[0] // (patch_size_t * patch_size**2),
        "num_layers": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "ff_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "text_dim": text_dim,
        "text_max_length": length,
        "space_scale": space_scale,
        "time_scale": time_scale,
    }


def from_official(
    state: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    space_scale: float = 1.0,
    time_scale: float = 1.0,
) -> MVDiT:
    """Return a model from an official state dict; the tables of positions may be there or not.

    A table for a size that isn't square is left out unchecked: its number of places doesn't tell rows from columns.

    Args:
        state: tensors in the official layout.
        num_attention_heads: see `infer_config`.
        space_scale: see `infer_config`.
        time_scale: see `infer_config`.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys, shapes or positions don't fit the layout.
        ValueError: an unknown number of heads.
    """
    places = state[PLACES].shape[1] if PLACES in state else 1
    if math.isqrt(places) ** 2 != places:
        state = {key: tensor for key, tensor in state.items() if key != PLACES}
    config = infer_config(state, num_attention_heads, space_scale, time_scale)
    rules = official_rules(config)
    filled = {rule.source: rule.value() for rule in rules if isinstance(rule, Drop) and rule.source not in state}
    converted = convert({**filled, **state}, rules)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = MVDiT(**config)
    return load_exactly(model, converted)


def to_official(model: MVDiT) -> dict[str, Tensor]:
    """Return the state dict of a model in the official layout, bit for bit what `from_official` read."""
    state = convert(model.state_dict(), inverse(official_rules(model.config)))
    return {**state, PLACES: state[PLACES].to(model.dtype), TIMES: state[TIMES].to(model.dtype)}
