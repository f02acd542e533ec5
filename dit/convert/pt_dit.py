"""Published PT-DiT checkpoints: their layout as a key map, and whole models from them and back.

*Official* is the layout of Ascend/MindSpeed-MM (mindspeed_mm/models/predictor/dits/pt_dit_diffusers.py), where the code
of Qihoo-T2X was published. *Ours* is `dit.models.pt_dit.PTDiT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit.convert.keymap import Drop, Rename, Rule, affine, convert, inverse
from dit.convert.var import check_has, load_exactly
from dit.layers.positions import sincos_3d
from dit.layers.windows import Sizes
from dit.models.pt_dit import PTDiT

POSITIONS = "pos_embed.pos_embed"

_HEAD_DIM = 72  # of the released model

_ATTENTIONS = {
    "proxy_attn1": "proxy_attn",
    "pvisual_attn2": "proxy_cross_attn",
    "attn1": "window_attn",
    "attn3": "shifted_attn",
    "attn2": "text_attn",
}


def official_rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return the map from the official layout to ours; `inverse` of it exports.

    Args:
        config: arguments of `PTDiT`, all that shape its weights.
    """
    side, frames = config["sample_size"] // config["patch_size"], config["num_frames"]
    width, unit = config["num_attention_heads"] * config["attention_head_dim"], max(config["sample_size"] // 64, 1)
    embed = "adaln_single.emb"
    rules: list[Rule] = [
        Drop(POSITIONS, lambda: sincos_3d(frames, side, side, width, unit).unflatten(0, (frames, -1))[None]),
        *affine(Rename, "pos_embed.proj", "patch_embed"),
        *affine(Rename, "adaln_single.linear", "adaln_single.linear"),
        Rename("scale_shift_table", "scale_shift_table"),
        *affine(Rename, "proj_out", "proj_out"),
    ]
    embedders = {"timestep_embedder": "time_embed"}
    if config["size_conditions"]:
        embedders |= {"resolution_embedder": "resolution_embed", "aspect_ratio_embedder": "aspect_ratio_embed"}
    for linear in ("linear_1", "linear_2"):
        rules += affine(Rename, f"caption_projection.{linear}", f"text_projection.{linear}")
        for theirs, ours in embedders.items():
            rules += affine(Rename, f"{embed}.{theirs}.{linear}", f"{ours}.{linear}")
    for i in range(config["num_layers"]):
        rules += _block_rules(f"transformer_blocks.{i}", config)
    return tuple(rules)


def _block_rules(block: str, config: Mapping[str, Any]) -> list[Rule]:
    """Return the rules of one block, which both layouts call the same."""
    rules: list[Rule] = [
        Rename(f"{block}.scale_shift_table", f"{block}.scale_shift_table"),
        *affine(Rename, f"{block}.linear_1_visual", f"{block}.proxy_cross_proj"),
        *affine(Rename, f"{block}.ff.net.0.proj", f"{block}.ff.net.0.proj"),
        *affine(Rename, f"{block}.ff.net.2", f"{block}.ff.net.2"),
    ]
    if config["shift_window"]:
        rules.append(Rename(f"{block}.proxy_scale_shift_table", f"{block}.shift_table"))
        rules += affine(Rename, f"{block}.linear_2", f"{block}.shift_proj")
    for theirs, ours in _ATTENTIONS.items():
        if theirs == "attn3" and not config["shift_window"]:
            continue
        for projection in ("to_q", "to_k", "to_v"):
            weight, bias = affine(Rename, f"{block}.{theirs}.{projection}", f"{block}.{ours}.{projection}")
            rules += [weight, bias] if config["attention_bias"] else [weight]
        rules += affine(Rename, f"{block}.{theirs}.to_out.0", f"{block}.{ours}.to_out.0")
    return rules


def infer_config(
    state: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    window_size: Sizes = (1, 8, 8),
    proxies_per_window: Sizes = (1, 1, 1),
) -> dict[str, Any]:
    """Read a configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout; without a stored position table the released size is taken.
        num_attention_heads: shapes don't show it; None takes heads of the released width, 72.
        window_size: the official `compress_ratios`, which shapes don't show either.
        proxies_per_window: `compress_ratios` over `proxy_compress_ratios` in rows and columns, 1 in frames.

    Returns:
        Arguments of `PTDiT`.

    Raises:
        KeyMapError: the state dict is not in the official layout.
        ValueError: the number of heads is not given and heads of 72 don't fit.
    """
    first = "transformer_blocks.0"
    needed = ("pos_embed.proj.weight", "proj_out.weight", "caption_projection.linear_1.weight")
    check_has(state, (*needed, f"{first}.ff.net.0.proj.weight", f"{first}.linear_1_visual.weight"), "a PT-DiT")
    width, in_channels, patch_size, _ = state["pos_embed.proj.weight"].shape
    if num_attention_heads is None and width % _HEAD_DIM:
        raise ValueError(f"width {width} is not that of the released model (16 heads of 72); say num_attention_heads")
    heads = num_attention_heads or width // _HEAD_DIM
    table = state.get(POSITIONS)
    return {
        "sample_size": 32 if table is None else math.isqrt(table.shape[2]) * patch_size,
        "num_frames": 1 if table is None else table.shape[1],
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": state["proj_out.weight"].shape[0] // patch_size**2,
        "num_layers": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks.")),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "ff_ratio": state[f"{first}.ff.net.0.proj.weight"].shape[0] / width,
        "text_dim": state["caption_projection.linear_1.weight"].shape[1],
        "attention_bias": f"{first}.attn1.to_q.bias" in state,
        "window_size": tuple(window_size),
        "proxies_per_window": tuple(proxies_per_window),
        "shift_window": f"{first}.attn3.to_q.weight" in state,
        "size_conditions": "adaln_single.emb.resolution_embedder.linear_1.weight" in state,
    }


def from_official(
    state: Mapping[str, Tensor],
    num_attention_heads: int | None = None,
    window_size: Sizes = (1, 8, 8),
    proxies_per_window: Sizes = (1, 1, 1),
) -> PTDiT:
    """Return a model from an official state dict; the table of positions may be there or not.

    Args:
        state: tensors in the official layout.
        num_attention_heads: see `infer_config`.
        window_size: see `infer_config`.
        proxies_per_window: see `infer_config`.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys, shapes or positions don't fit the layout.
        ValueError: an unknown number of heads, or windows that proxies don't divide.
    """
    config = infer_config(state, num_attention_heads, window_size, proxies_per_window)
    rules = official_rules(config)
    filled = {rule.source: rule.value() for rule in rules if isinstance(rule, Drop) and rule.source not in state}
    converted = convert({**filled, **state}, rules)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = PTDiT(**config)
    return load_exactly(model, converted)


def to_official(model: PTDiT) -> dict[str, Tensor]:
    """Return the state dict of a model in the official layout, bit for bit what `from_official` read."""
    state = convert(model.state_dict(), inverse(official_rules(model.config)))
    return {**state, POSITIONS: state[POSITIONS].to(model.dtype)}
