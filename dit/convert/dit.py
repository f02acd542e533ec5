"""Published DiT and SiT checkpoints: their layouts as key maps, and whole models from them and back.

Three layouts meet here. *Official* is that of facebookresearch/DiT and willisma/SiT (fused qkv, stored
positions). *diffusers* is that of `DiTTransformer2DModel`, which keeps a timestep and a label embedder in
every block. *Ours* is `dit.models.dit.DiT`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors.torch import load_file
from torch import Tensor

from dit.convert.keymap import Drop, KeyMapError, Merge, Rename, Rule, Split, affine, convert, inverse
from dit.layers.positions import sincos_2d
from dit.models.dit import PRESETS, DiT

logger = logging.get_logger(__name__)

OBJECTIVES = {"dit": "epsilon", "sit": "velocity"}
"""What each published family was trained to predict."""

POSITION_DRIFT = 1e-3
"""How far a stored position table may be from the exact one.

The official trainers average the fixed table along with the weights, and in float32 the average of a constant
drifts: by up to half a unit in the last place over (1 - decay), about 3e-4 for a decay of 0.9999.
"""

_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def official_rules(num_layers: int, grid: int, hidden_size: int) -> tuple[Rule, ...]:
    """Return the map from the official layout to ours; `inverse` of it exports.

    Args:
        num_layers: number of blocks.
        grid: tokens along one side of the stored position table.
        hidden_size: model width D.
    """
    return (
        Drop("pos_embed", lambda: sincos_2d(grid, grid, hidden_size)[None], atol=POSITION_DRIFT),
        Rename("y_embedder.embedding_table.weight", "label_embed.table.weight"),
        *ends_rules(),
        *(rule for i in range(num_layers) for rule in block_rules(f"blocks.{i}", f"transformer_blocks.{i}")),
    )


def ends_rules() -> tuple[Rule, ...]:
    """Return the rules of what stands before and behind the blocks; networks that grew out of DiT share them."""
    return (
        *affine(Rename, "x_embedder.proj", "patch_embed"),
        *affine(Rename, "t_embedder.mlp.0", "time_embed.linear_1"),
        *affine(Rename, "t_embedder.mlp.2", "time_embed.linear_2"),
        *affine(Rename, "final_layer.adaLN_modulation.1", "modulation_out.linear"),
        *affine(Rename, "final_layer.linear", "proj_out"),
    )


def attention_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Return the rules of an attention layer with fused projections.

    Args:
        theirs: its official name.
        ours: its name here.
    """
    return (
        *affine(Split, f"{theirs}.qkv", tuple(f"{ours}.to_{part}" for part in "qkv")),
        *affine(Rename, f"{theirs}.proj", f"{ours}.to_out.0"),
    )


def block_rules(theirs: str, ours: str, attention: str = "attn") -> tuple[Rule, ...]:
    """Return the rules of a DiT block.

    Args:
        theirs: its official name.
        ours: its name here.
        attention: how its attention is called here; officially it is always "attn".
    """
    return (
        *attention_rules(f"{theirs}.attn", f"{ours}.{attention}"),
        *affine(Rename, f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj"),
        *affine(Rename, f"{theirs}.mlp.fc2", f"{ours}.ff.net.2"),
        *affine(Rename, f"{theirs}.adaLN_modulation.1", f"{ours}.modulation.linear"),
    )


def diffusers_rules(num_layers: int) -> tuple[Rule, ...]:
    """Return the map from the layout of diffusers' `DiTTransformer2DModel` to ours; `inverse` of it exports.

    Args:
        num_layers: number of blocks.
    """
    embedder = [f"transformer_blocks.{i}.norm1.emb" for i in range(num_layers)]

    def from_each(part: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{part}" for prefix in embedder)

    rules: list[Rule] = [
        *affine(Rename, "pos_embed.proj", "patch_embed"),
        *affine(Merge, from_each("timestep_embedder.linear_1"), "time_embed.linear_1"),
        *affine(Merge, from_each("timestep_embedder.linear_2"), "time_embed.linear_2"),
        Merge(from_each("class_embedder.embedding_table.weight"), "label_embed.table.weight"),
        *affine(Rename, "proj_out_1", "modulation_out.linear"),
        *affine(Rename, "proj_out_2", "proj_out"),
    ]
    for i in range(num_layers):
        block = f"transformer_blocks.{i}"
        rules += [
            *affine(Rename, f"{block}.norm1.linear", f"{block}.modulation.linear"),
            *(
                r
                for part in ("to_q", "to_k", "to_v", "to_out.0")
                for r in affine(Rename, f"{block}.attn1.{part}", f"{block}.attn.{part}")
            ),
            *affine(Rename, f"{block}.ff.net.0.proj", f"{block}.ff.net.0.proj"),
            *affine(Rename, f"{block}.ff.net.2", f"{block}.ff.net.2"),
        ]
    return tuple(rules)


def read_checkpoint(path: str | Path, weights: str = "ema") -> dict[str, Tensor]:
    """Read a state dict without running any code of the file.

    Args:
        path: a .safetensors file, or a .pt, .pth, .ckpt or .bin file of tensors and plain settings.
        weights: which weights of a trainer's checkpoint {model, ema, opt, args} to take: "ema" or "model".

    Returns:
        Tensors by key, on the CPU, without the prefix that data parallelism leaves.

    Raises:
        ValueError: another suffix, no such weights in the file, or a value that is not a tensor.
        pickle.UnpicklingError: the file would have to run code to be read.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix not in _PICKLE_SUFFIXES:
        raise ValueError(
            f"can't read {path.name}: the suffix must be .safetensors or one of {', '.join(_PICKLE_SUFFIXES)}"
        )
    # The official trainers store their settings as a Namespace: a bag of attributes that runs nothing.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if "ema" in content or "model" in content:
        if weights not in content:
            raise ValueError(f"{path.name} holds {sorted(content)}, not {weights!r}; choose one of them")
        content = content[weights]
    content = content.get("state_dict", content)  # what trainers of other projects call it
    odd = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(f"{path.name} is not a state dict: {odd[0]!r} is no tensor; expected names and tensors")
    prefix = "module." if content and all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def infer_config(state: Mapping[str, Tensor], num_attention_heads: int | None = None) -> dict[str, Any]:
    """Read a DiT configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout.
        num_attention_heads: shapes don't show it; None looks it up among the published sizes.

    Returns:
        Arguments of `DiT`, without the objective.

    Raises:
        KeyMapError: the state dict is not in the official layout.
        ValueError: the number of heads is not given and the size is not a published one.
    """
    needed = (
        "x_embedder.proj.weight",
        "pos_embed",
        "final_layer.linear.weight",
        "blocks.0.mlp.fc1.weight",
        "y_embedder.embedding_table.weight",
    )
    missing = [key for key in needed if key not in state]
    if missing:
        raise KeyMapError(f"not an official DiT or SiT state dict: it lacks {', '.join(missing)}")
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    num_layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    heads = num_attention_heads or _published_heads(hidden_size, num_layers)
    return {
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": state["final_layer.linear.weight"].shape[0] // patch_size**2,
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": hidden_size // heads,
        "ff_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        # The published tables end with the row for 'no class'.
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
    }


def _published_heads(hidden_size: int, num_layers: int) -> int:
    """Return the number of heads of the published size with this width and depth."""
    for preset in PRESETS.values():
        heads = preset["num_attention_heads"]
        if heads * preset["attention_head_dim"] == hidden_size and preset["num_layers"] == num_layers:
            return heads
    raise ValueError(
        f"width {hidden_size} with {num_layers} blocks is not a published size (S, B, L, XL); say num_attention_heads"
    )


def from_official(state: Mapping[str, Tensor], family: str = "dit", num_attention_heads: int | None = None) -> DiT:
    """Return a model from an official state dict.

    Args:
        state: tensors in the layout of facebookresearch/DiT or willisma/SiT.
        family: "dit" or "sit".
        num_attention_heads: needed for sizes that were never published.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys or the position table don't fit the layout.
        ValueError: an unknown family, or an unknown number of heads.
    """
    if family not in OBJECTIVES:
        raise ValueError(f"family {family!r} is not known; use one of {sorted(OBJECTIVES)}")
    config = infer_config(state, num_attention_heads)
    rules = official_rules(
        config["num_layers"],
        config["sample_size"] // config["patch_size"],
        state["x_embedder.proj.bias"].shape[0],
    )
    model = _build({**config, "objective": OBJECTIVES[family]}, convert(state, rules))
    drift = (state["pos_embed"][0].float() - model.pos_embed.to(state["pos_embed"].dtype).float()).abs().max()
    if drift > 1e-6:
        logger.warning(f"The stored position table is off by {drift:.1g}; the exact one takes its place.")
    return model


def to_official(model: DiT) -> dict[str, Tensor]:
    """Return the state dict of a model in the official layout, bit for bit what `from_official` read.

    Only a position table that had drifted comes back exact (see `POSITION_DRIFT`).
    """
    config = model.config
    rules = official_rules(config.num_layers, config.sample_size // config.patch_size, model.hidden_size)
    state = convert(model.state_dict(), inverse(rules))
    return {**state, "pos_embed": state["pos_embed"].to(model.dtype)}


def from_diffusers(folder: str | Path) -> DiT:
    """Return a model from the folder of a diffusers `DiTTransformer2DModel`.

    The weights of such folders come from the official model, so ours gives the official outputs: its timestep
    frequencies are `10000^(-i/128)`, where diffusers' class runs the same weights with `10000^(-i/127)`
    (`downscale_freq_shift` 0 rather than 1).

    Args:
        folder: holds config.json and diffusion_pytorch_model.safetensors.

    Returns:
        The model in evaluation mode, in the dtype of the file.

    Raises:
        ValueError: the folder describes another class or a variant of it that DiT never used.
        KeyMapError: keys don't fit, or blocks disagree about the timestep or label embedder.
    """
    folder = Path(folder)
    theirs = json.loads((folder / "config.json").read_text())
    if theirs.get("_class_name") != "DiTTransformer2DModel":
        raise ValueError(f"{folder} holds a {theirs.get('_class_name')}; expected a DiTTransformer2DModel")
    if theirs.get("activation_fn", "gelu-approximate") != "gelu-approximate":
        raise ValueError(f"activation_fn {theirs['activation_fn']!r} can't be converted; DiT uses gelu-approximate")
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    width = theirs["num_attention_heads"] * theirs["attention_head_dim"]
    same = (
        "sample_size",
        "patch_size",
        "in_channels",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
    )
    config = {
        **{name: theirs[name] for name in same},
        "out_channels": theirs.get("out_channels") or theirs["in_channels"],
        "ff_ratio": state["transformer_blocks.0.ff.net.0.proj.weight"].shape[0] / width,
        "num_classes": theirs["num_embeds_ada_norm"],
        "objective": "epsilon",
    }
    return _build(config, convert(state, diffusers_rules(theirs["num_layers"])))


def _build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiT:
    """Return a model of this configuration that holds exactly these tensors."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = DiT(**config)
    model.load_state_dict(state, strict=True, assign=True)
    side = config["sample_size"] // config["patch_size"]
    model.pos_embed = sincos_2d(side, side, model.hidden_size)  # (N, D); not part of the state dict
    return model.requires_grad_(True).eval()
