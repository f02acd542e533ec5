"""Published Infinity checkpoints: transformers and multi-scale BSQ tokenizers, to models of ours and back.

*Official* is the layout of FoundationVision/Infinity. A transformer is a plain state dict (`infinity_2b_reg.pth`), a
folder of shards with an index (`infinity_8b_weights`), or part of its trainer's checkpoint. A tokenizer is a dict
whose entry "vae" is the state dict (`infinity_vae_d32reg.pth`); convolutions and norms sit in wrappers there
(`conv1.conv.weight`), and plain names (`conv1.weight`), which the official loader takes too, are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.convert.autoencoder_cnn import AutoencoderLayout
from dit.convert.keymap import Drop, KeyMapError, Rename, Reshape, Rule, Split, affine, convert, inverse
from dit.convert.var import check_has, load_exactly, read_checkpoint, trainer_parts
from dit.layers.resolutions import NUM_SCALES, SCALE_SCHEDULES
from dit.models.next_scale import NextScaleTransformer
from dit.tokenizers.multi_scale_bsq import MultiScaleBSQ

TOKENIZER = "vae"
"""Where a published file keeps the tokenizer; see `dit.convert.var.read_checkpoint`."""

WEIGHTS = {"ema": ("gpt_ema_fsdp", "gpt_ema_for_vis"), "model": ("gpt_fsdp", "gpt_wo_ddp")}
"""Where a trainer's checkpoint keeps the transformer: averaged, and as trained."""

TRAINER_TOKENIZER = "vae_local"
"""Where a trainer's checkpoint keeps the tokenizer."""


def square_scales(resolution: str = "1M") -> tuple[int, ...]:
    """Return sides of the token maps of square images, coarse to fine.

    Args:
        resolution: a key of `dit.layers.resolutions.NUM_SCALES`: "1M" is 1024 pixels (10521 tokens), "0.25M" 512.

    Raises:
        ValueError: another one.
    """
    if resolution not in NUM_SCALES:
        raise ValueError(f"resolution {resolution!r} is not published; use one of {', '.join(NUM_SCALES)}")
    return tuple(rows for rows, _ in SCALE_SCHEDULES[1.0][: NUM_SCALES[resolution]])


SCALES_1M = square_scales()
"""Sides of the token maps for square images of 1024 pixels."""

_MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")  # powers of two, and the same module under a second name


# ---------------------------------------------------------------------- files

_INDEXES = ("pytorch_model.bin.index.json", "model.safetensors.index.json", "diffusion_pytorch_model.bin.index.json")
_RECOMPUTED = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")


def read_transformer(path: str | Path, weights: str = "ema") -> tuple[dict[str, Tensor], str]:
    """Read the state dict of a transformer without running any code of its files.

    Args:
        path: a file, or a folder of shards.
        weights: which weights of a trainer's checkpoint to take, a key of `WEIGHTS`; files with one set have no choice.

    Returns:
        Tensors by key, on the CPU, and what was taken: "model", "ema", or "" where there was no choice.

    Raises:
        ValueError: no index, a missing or damaged shard, or a trainer's checkpoint without such weights.
        pickle.UnpicklingError: a file would have to run code to be read.
    """
    path = Path(path)
    if path.is_dir():
        return _read_shards(path), ""
    parts = trainer_parts(path)
    if not parts:
        return read_checkpoint(path), ""
    found = next((part for part in WEIGHTS[weights] if part in parts), None)
    if found is None:
        raise ValueError(f"{path.name} has no {weights!r} weights; it holds {sorted(parts)}. Try the other --weights.")
    return read_checkpoint(path, found), weights


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards that a folder's index names."""
    index = next((folder / name for name in _INDEXES if (folder / name).is_file()), None)
    if index is None:
        raise ValueError(f"{folder} holds no index of shards; expected one of {', '.join(_INDEXES)}")
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{index} is damaged: it holds no weight_map ({error}); download it again") from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise ValueError(f"{index} names the shard {name!r} outside of its folder; it is not a published index")
        state |= read_checkpoint(folder / name)
    missing = sorted(files.keys() - state.keys())
    if missing:
        raise ValueError(f"the shards of {folder} lack {len(missing)} tensors of the index, such as {missing[0]}")
    return state


# ---------------------------------------------------------------- transformer


def transformer_rules(config: Mapping[str, Any], chunks: int) -> tuple[Rule, ...]:
    """Return the map from the official layout of a transformer to ours; `inverse` of it exports.

    Args:
        config: arguments of `NextScaleTransformer`, all that shape its weights.
        chunks: parts that the blocks are grouped in; 1 for a plain list.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    pool_heads = config["text_pool_heads"]
    pool, ours = "text_proj_for_sos.ca", "text_pool"
    rules: list[Rule] = [
        Rename("cfg_uncond", "null_text"),
        Rename("text_norm.weight", "text_norm.weight"),
        Reshape(
            f"{pool}.mat_q", f"{ours}.query", (1, pool_heads, width // pool_heads), (pool_heads, width // pool_heads)
        ),
        *_text_keys(pool, ours, width),
        *affine(Rename, f"{pool}.proj", f"{ours}.proj_out"),
        *affine(Rename, "text_proj_for_ca.0", "text_proj.linear_1"),
        *affine(Rename, "text_proj_for_ca.2", "text_proj.linear_2"),
        Reshape("pos_start", "start_embed", (1, 1, width), (1, width)),
        Rename("lvl_embed.weight", "scale_embed.weight"),
        *affine(Rename, "word_embed", "code_embed"),
        *affine(Rename, "shared_ada_lin.1", "adaln_single.linear"),
        *affine(Rename, "head_nm.ada_lin.1", "modulation_out"),
        *affine(Rename, "head", "proj_out"),
    ]
    size = config["num_layers"] // chunks
    for i in range(config["num_layers"]):
        theirs = f"blocks.{i}" if chunks == 1 else f"block_chunks.{i // size}.module.{i % size}"
        rules += _block_rules(theirs, f"transformer_blocks.{i}", config["num_attention_heads"], width)
    return tuple(rules)


def _text_keys(theirs: str, ours: str, width: int) -> list[Rule]:
    """Return the rules of keys and values of the text; only values have a bias."""
    return [
        Split(f"{theirs}.mat_kv.weight", tuple(f"{ours}.to_{part}.weight" for part in "kv")),
        Rename(f"{theirs}.v_bias", f"{ours}.to_v.bias"),
        Drop(f"{theirs}.zero_k_bias", lambda: torch.zeros(width), atol=0.0),
    ]


def _block_rules(theirs: str, ours: str, heads: int, width: int) -> list[Rule]:
    """Return the rules of one block."""
    return [
        Reshape(f"{theirs}.ada_gss", f"{ours}.modulation_table", (1, 1, 6, width), (6, width)),
        Split(f"{theirs}.sa.mat_qkv.weight", tuple(f"{ours}.attn.to_{part}.weight" for part in "qkv")),
        Rename(f"{theirs}.sa.q_bias", f"{ours}.attn.to_q.bias"),
        Rename(f"{theirs}.sa.v_bias", f"{ours}.attn.to_v.bias"),
        Drop(f"{theirs}.sa.zero_k_bias", lambda: torch.zeros(width), atol=0.0),
        Reshape(f"{theirs}.sa.scale_mul_1H11", f"{ours}.attn.log_sharpness", (1, heads, 1, 1), (heads,)),
        *affine(Rename, f"{theirs}.sa.proj", f"{ours}.attn.to_out.0"),
        *affine(Rename, f"{theirs}.ca_norm", f"{ours}.norm_cross"),
        *affine(Rename, f"{theirs}.ca.mat_q", f"{ours}.cross_attn.to_q"),
        *_text_keys(f"{theirs}.ca", f"{ours}.cross_attn", width),
        *affine(Rename, f"{theirs}.ca.proj", f"{ours}.cross_attn.to_out.0"),
        *affine(Rename, f"{theirs}.ffn.fc1", f"{ours}.ff.net.0.proj"),
        *affine(Rename, f"{theirs}.ffn.fc2", f"{ours}.ff.net.2"),
    ]


def infer_transformer_config(
    state: Mapping[str, Tensor], scales: Sequence[int | Sequence[int]] = SCALES_1M, patchify: int | None = None
) -> dict[str, Any]:
    """Read a configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout.
        scales: sides of the token maps that are generated by default, which the weights don't show.
        patchify: latent pixels along a side of a token; None is 2 for 56 bits a token (Infinity-8B), and 1 for others.

    Returns:
        Arguments of `NextScaleTransformer`.

    Raises:
        KeyMapError: the state dict is not in the official layout, or does not predict bits.
    """
    first, _ = _blocks_of(state)
    fc1, sharpness, query = f"{first}.ffn.fc1.weight", f"{first}.sa.scale_mul_1H11", "text_proj_for_sos.ca.mat_q"
    needed = ("cfg_uncond", "pos_start", "word_embed.weight", "head.weight", "lvl_embed.weight", query, fc1, sharpness)
    check_has(state, (*needed, "shared_ada_lin.1.weight"), "an Infinity transformer")
    width, bits = state["word_embed.weight"].shape
    if state["head.weight"].shape[0] != 2 * bits:
        raise KeyMapError(f"head.weight has {state['head.weight'].shape[0]} rows, expected two for each of {bits} bits")
    patchify = patchify or (2 if bits == 56 else 1)
    heads = state[sharpness].numel()
    return {
        "scales": tuple(scales),
        "latent_channels": bits // patchify**2,
        "patchify": patchify,
        "num_layers": sum(key.endswith(".ada_gss") for key in state),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "ff_ratio": state[fc1].shape[0] / width,
        "shared_modulation": True,
        "text_dim": state["cfg_uncond"].shape[1],
        "text_max_length": state["cfg_uncond"].shape[0],
        "text_pool_heads": state[query].shape[1],
        "bitwise": True,
        "positions": "rotary",
        "max_scales": state["lvl_embed.weight"].shape[0],
    }


def _blocks_of(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return how a state dict names its first block, and how many parts the blocks are grouped in."""
    parts = {key.split(".")[1] for key in state if key.startswith("block_chunks.")}
    return ("block_chunks.0.module.0", len(parts)) if parts else ("blocks.0", 1)


def transformer_from_official(
    state: Mapping[str, Tensor], scales: Sequence[int | Sequence[int]] = SCALES_1M, patchify: int | None = None
) -> NextScaleTransformer:
    """Return a transformer from an official state dict; tables that are recomputed may be there or not.

    Args:
        state: tensors in the official layout.
        scales: see `infer_transformer_config`.
        patchify: see `infer_transformer_config`.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys or shapes don't fit the layout.
    """
    config = infer_transformer_config(state, scales, patchify)
    rules = transformer_rules(config, _blocks_of(state)[1])
    state = {key: value for key, value in state.items() if key not in _RECOMPUTED}
    for key, value in state.items():
        if key.endswith("scale_mul_1H11"):  # the official kernel keeps heads on another axis
            state[key] = value.reshape(1, -1, 1, 1)
    filled = {rule.source: rule.value() for rule in rules if isinstance(rule, Drop) and rule.source not in state}
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = NextScaleTransformer(**config)
    return load_exactly(model, convert({**filled, **state}, rules))


def transformer_to_official(model: NextScaleTransformer, chunks: int | None = None) -> dict[str, Tensor]:
    """Return the state dict of a transformer in the official layout.

    Args:
        model: one that reads text and predicts bits.
        chunks: parts that the blocks are grouped in; None is the released number: 8 for Infinity-2B and 8B, 4 for the
            others, or 1 where 4 does not divide them.

    Raises:
        ValueError: a number that does not divide the blocks.
    """
    config = model.config
    depth, width = config.num_layers, config.num_attention_heads * config.attention_head_dim
    if chunks is None:
        chunks = 8 if (depth, width) in ((32, 2048), (40, 3584)) else 4 if depth % 4 == 0 else 1
    if chunks < 1 or depth % chunks:
        raise ValueError(f"{depth} blocks can't be grouped in {chunks} equal parts; use a divisor")
    state = convert(model.state_dict(), inverse(transformer_rules(config, chunks)))
    return {key: value.to(model.dtype) for key, value in state.items()}


# ------------------------------------------------------------------ tokenizer


def tokenizer_rules(config: Mapping[str, Any], is_wrapped: bool = True) -> tuple[Rule, ...]:
    """Return the map from the official layout of a tokenizer to ours; `inverse` of it exports.

    Args:
        config: arguments of `MultiScaleBSQ`, all that shape its weights.
        is_wrapped: whether names have the wrappers.
    """
    powers = range(config["latent_channels"] - 1, -1, -1)
    masks = tuple(Drop(key, lambda: torch.tensor([2**power for power in powers]), atol=0.0) for key in _MASKS)
    layout = AutoencoderLayout(
        config["block_out_channels"], config["layers_per_block"], has_attention=False, is_wrapped=is_wrapped
    )
    return (*masks, *layout.rules())


def infer_tokenizer_config(
    state: Mapping[str, Tensor], scales: Sequence[int | Sequence[int]] = SCALES_1M, patchify: int | None = None
) -> dict[str, Any]:
    """Read a configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout, wrapped or plain.
        scales: sides of the token maps, the default schedule of the model.
        patchify: latent pixels along a side of a token; None is 2 for the published tokenizer with 14 bits a latent
            pixel and a compression of 8, and 1 for all others.

    Returns:
        Arguments of `MultiScaleBSQ`.

    Raises:
        KeyMapError: the state dict is not in the official layout.
    """
    wrapper = ".conv" if _is_wrapped(state) else ""
    check_has(state, (f"encoder.conv_out{wrapper}.weight", f"encoder.conv_in{wrapper}.weight"), "an Infinity tokenizer")

    def count(start: str) -> int:
        return len({key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)})

    levels = count("encoder.down.")
    bits = state[f"encoder.conv_out{wrapper}.weight"].shape[0]
    return {
        "scales": tuple(scales),
        "latent_channels": bits,
        "block_out_channels": tuple(
            state[f"encoder.down.{i}.block.0.conv1{wrapper}.weight"].shape[0] for i in range(levels)
        ),
        "layers_per_block": count("encoder.down.0.block."),
        "patchify": patchify or (2 if (bits, levels) == (14, 4) else 1),
    }


def _is_wrapped(state: Mapping[str, Tensor]) -> bool:
    return "encoder.conv_in.conv.weight" in state


def tokenizer_from_official(
    state: Mapping[str, Tensor], scales: Sequence[int | Sequence[int]] = SCALES_1M, patchify: int | None = None
) -> MultiScaleBSQ:
    """Return a tokenizer from an official state dict.

    Args:
        state: tensors in the official layout, wrapped or plain; the masks may be missing.
        scales: see `infer_tokenizer_config`.
        patchify: see `infer_tokenizer_config`.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys or shapes don't fit the layout.
    """
    config = infer_tokenizer_config(state, scales, patchify)
    rules = tokenizer_rules(config, _is_wrapped(state))
    filled = {rule.source: rule.value() for rule in rules if isinstance(rule, Drop) and rule.source not in state}
    with torch.device("meta"):
        model = MultiScaleBSQ(**config)
    return load_exactly(model, convert({**filled, **state}, rules))


def tokenizer_to_official(model: MultiScaleBSQ) -> dict[str, Tensor]:
    """Return the state dict of a tokenizer in the official layout, with wrappers and masks."""
    return convert(model.state_dict(), inverse(tokenizer_rules(model.config)))
