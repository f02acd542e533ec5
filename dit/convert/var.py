"""Published VAR checkpoints: the transformers and their multi-scale VQVAE, to whole models of ours and back.

*Official* is the layout of FoundationVision/VAR: plain state dicts `var_d16.pth` ... `var_d36.pth` and
`vae_ch160v4096z32.pth`, or both of them nested in a checkpoint of its trainer.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.utils import logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit.convert.autoencoder_cnn import AutoencoderLayout
from dit.convert.keymap import Drop, KeyMapError, Rename, Reshape, Rule, Split, affine, convert, inverse
from dit.layers.scales import block_causal_mask, scale_grids, token_scales
from dit.models.next_scale import SCALES_256, SCALES_512, NextScaleTransformer
from dit.tokenizers.multi_scale_vq import MultiScaleVQ

ModelT = TypeVar("ModelT", bound=torch.nn.Module)

logger = logging.get_logger(__name__)

TRANSFORMER, TOKENIZER = "var_wo_ddp", "vae_local"
"""Where a trainer's checkpoint keeps the two models."""

_PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_PREFIXES = ("module.", "_orig_mod.")  # left by data parallelism and by compilation


# ---------------------------------------------------------------------- files


def read_checkpoint(path: str | Path, part: str = TRANSFORMER) -> dict[str, Tensor]:
    """Read a state dict without running any code of the file.

    Args:
        path: a .safetensors file, or a .pth, .pt, .ckpt or .bin file of tensors and plain settings.
        part: which model to take of a trainer's checkpoint, e.g. `TRANSFORMER` or `TOKENIZER`.

    Returns:
        Tensors by key, on the CPU, without the prefixes of wrappers.

    Raises:
        ValueError: another suffix, a damaged file, no such model in it, or a value that is not a tensor.
        pickle.UnpicklingError: the file would have to run code to be read.
    """
    path = Path(path)
    if path.suffix != ".safetensors" and path.suffix not in _PICKLE_SUFFIXES:
        known = ", ".join((".safetensors", *_PICKLE_SUFFIXES))
        raise ValueError(f"can't read {path.name}: the suffix must be one of {known}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; pass a published checkpoint")
    state = _find_state(_read(path, "cpu"), part, path.name)
    odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if odd or not state:
        raise ValueError(f"{path.name} is not a state dict: expected names and tensors, found {odd[:1] or 'nothing'}")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def trainer_parts(path: str | Path) -> set[str]:
    """Return names of the models that a trainer's checkpoint holds; none for other files. Reads no tensor."""
    path = Path(path)
    if path.suffix not in _PICKLE_SUFFIXES or not path.is_file():
        return set()
    content = _read(path, "meta")
    trainer = content.get("trainer") if isinstance(content, Mapping) else None
    return {name for name, part in trainer.items() if isinstance(part, Mapping)} if trainer else set()


def holds_both(path: str | Path) -> bool:
    """Return whether a file is a trainer's checkpoint, which brings the tokenizer along."""
    return TOKENIZER in trainer_parts(path)


def _read(path: Path, device: str) -> Any:
    """Return what a file holds; nothing but tensors and plain settings is built."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path.name} is damaged or no checkpoint ({error}); download it again") from error


def _find_state(content: object, part: str, name: str) -> Mapping[str, Any]:
    """Return the state dict of one model in what a file holds."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} holds a {type(content).__name__}, expected a state dict")
    trainer = content.get("trainer", content)
    if part in trainer:
        return trainer[part]
    if "trainer" in content:
        raise ValueError(f"{name} is a trainer's checkpoint without {part!r}; it holds {sorted(trainer)}")
    return content


def check_has(state: Mapping[str, Tensor], needed: Sequence[str], what: str) -> None:
    """Raise a `KeyMapError` if a state dict lacks keys that every state dict of its kind has."""
    missing = [key for key in needed if key not in state]
    if missing:
        raise KeyMapError(f"not an official state dict of {what}: it lacks {', '.join(missing)}")


# ---------------------------------------------------------------- transformer


def transformer_rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Return the map from the official layout of a transformer to ours; `inverse` of it exports.

    Args:
        config: arguments of `NextScaleTransformer`, all that shape its weights.
    """
    heads = config["num_attention_heads"]
    width = heads * config["attention_head_dim"]
    grids = scale_grids(config["scales"])
    length, first = sum(rows * columns for rows, columns in grids), math.prod(grids[0])

    def mask() -> Tensor:
        return torch.zeros(1, 1, length, length).masked_fill(~block_causal_mask(grids), -torch.inf)

    rules: list[Rule] = [
        Reshape("pos_start", "start_embed", (1, first, width), (first, width)),
        Reshape("pos_1LC", "pos_embed", (1, length, width), (length, width)),
        Rename("lvl_embed.weight", "scale_embed.weight"),
        Rename("class_emb.weight", "class_embed.weight"),
        *affine(Rename, "word_embed", "code_embed"),
        *affine(Rename, "head_nm.ada_lin.1", "modulation_out"),
        *affine(Rename, "head", "proj_out"),
        Drop("lvl_1L", lambda: token_scales(grids)[None], atol=0.0),
        Drop("attn_bias_for_masking", mask, atol=0.0),
    ]
    if config["shared_modulation"]:
        rules += affine(Rename, "shared_ada_lin.1", "adaln_single.linear")
    for i in range(config["num_layers"]):
        rules += _block_rules(i, heads, width, config)
    return tuple(rules)


def _block_rules(i: int, heads: int, width: int, config: Mapping[str, Any]) -> list[Rule]:
    """Return the rules of one block."""
    theirs, ours = f"blocks.{i}", f"transformer_blocks.{i}"
    rules: list[Rule] = [
        Split(f"{theirs}.attn.mat_qkv.weight", tuple(f"{ours}.attn.to_{part}.weight" for part in "qkv")),
        Rename(f"{theirs}.attn.q_bias", f"{ours}.attn.to_q.bias"),
        Rename(f"{theirs}.attn.v_bias", f"{ours}.attn.to_v.bias"),
        Drop(f"{theirs}.attn.zero_k_bias", lambda: torch.zeros(width), atol=0.0),
        *affine(Rename, f"{theirs}.attn.proj", f"{ours}.attn.to_out.0"),
        *affine(Rename, f"{theirs}.ffn.fc1", f"{ours}.ff.net.0.proj"),
        *affine(Rename, f"{theirs}.ffn.fc2", f"{ours}.ff.net.2"),
    ]
    if config["qk_l2_norm"]:
        key = f"{theirs}.attn.scale_mul_1H11"
        rules.append(Reshape(key, f"{ours}.attn.log_sharpness", (1, heads, 1, 1), (heads,)))
    if config["shared_modulation"]:
        rules.append(Reshape(f"{theirs}.ada_gss", f"{ours}.modulation_table", (1, 1, 6, width), (6, width)))
    else:
        rules += affine(Rename, f"{theirs}.ada_lin.1", f"{ours}.modulation.linear")
    return rules


def infer_transformer_config(
    state: Mapping[str, Tensor], scales: Sequence[int] | None = None, num_attention_heads: int | None = None
) -> dict[str, Any]:
    """Read a configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout.
        scales: sides of the token maps; None reads them off `lvl_1L`, or knows them by the number of tokens.
        num_attention_heads: None reads it off `scale_mul_1H11`, or takes heads of width 64.

    Returns:
        Arguments of `NextScaleTransformer`.

    Raises:
        KeyMapError: the state dict is not in the official layout.
        ValueError: the schedule of scales is not known and not given.
    """
    block = "blocks.0"
    fc1, sharpness = f"{block}.ffn.fc1.weight", f"{block}.attn.scale_mul_1H11"
    needed = ("pos_1LC", "class_emb.weight", "word_embed.weight", "head.weight", fc1)
    check_has(state, needed, "a VAR transformer")
    _, length, width = state["pos_1LC"].shape
    if num_attention_heads is None:
        num_attention_heads = state[sharpness].shape[1] if sharpness in state else width // 64
    return {
        "scales": tuple(scales) if scales is not None else _scales_of(state, length),
        "latent_channels": state["word_embed.weight"].shape[1],
        "vocab_size": state["head.weight"].shape[0],
        "num_layers": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": width // num_attention_heads,
        "ff_ratio": state[fc1].shape[0] / width,
        "num_classes": state["class_emb.weight"].shape[0] - 1,  # the last row is 'no class'
        "shared_modulation": "shared_ada_lin.1.weight" in state,
        "qk_l2_norm": sharpness in state,
    }


def _scales_of(state: Mapping[str, Tensor], length: int) -> tuple[int, ...]:
    """Return the sides of the square token maps."""
    levels = state.get("lvl_1L")
    if levels is not None and not levels.is_meta:
        counts = torch.bincount(levels.flatten().long()).tolist()
        sides = tuple(math.isqrt(count) for count in counts)
        if sum(side * side for side in sides) == length:
            return sides
    published = {sum(side * side for side in scales): scales for scales in (SCALES_256, SCALES_512)}
    if length not in published:
        raise ValueError(f"{length} tokens are no published schedule ({sorted(published)} are); say scales=")
    return published[length]


def transformer_from_official(
    state: Mapping[str, Tensor], scales: Sequence[int] | None = None, num_attention_heads: int | None = None
) -> NextScaleTransformer:
    """Return a transformer from an official state dict; exports without the derived buffers are welcome too.

    Args:
        state: tensors in the official layout.
        scales: see `infer_transformer_config`.
        num_attention_heads: see `infer_transformer_config`.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys or shapes don't fit the layout.
        ValueError: the schedule of scales is not known.
    """
    config = infer_transformer_config(state, scales, num_attention_heads)
    rules = transformer_rules(config)
    derived = {rule.source: rule for rule in rules if isinstance(rule, Drop)}
    filled = {key: rule.value() for key, rule in derived.items() if key not in state}
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        model = NextScaleTransformer(**config)
    return load_exactly(model, convert({**filled, **state}, rules))


def transformer_to_official(model: NextScaleTransformer) -> dict[str, Tensor]:
    """Return a transformer's state dict in the official layout, bit for bit what `transformer_from_official` read."""
    return _cast(convert(model.state_dict(), inverse(transformer_rules(model.config))), model.dtype)


# ------------------------------------------------------------------ tokenizer


def tokenizer_rules(config: Mapping[str, Any], phis: str = "quantize.quant_resi.qresi_ls.{}") -> tuple[Rule, ...]:
    """Return the map from the official layout of a VQVAE to ours; `inverse` of it exports.

    Args:
        config: arguments of `MultiScaleVQ`, all that shape its weights.
        phis: official name of the i-th convolution `phi`.
    """
    rules: list[Rule] = [
        *affine(Rename, "quant_conv", "quant_conv"),
        *affine(Rename, "post_quant_conv", "post_quant_conv"),
        Rename("quantize.embedding.weight", "quantizer.codebook.weight"),
        Rename("quantize.ema_vocab_hit_SV", "quantizer.hits"),
    ]
    for i in range(config["num_phis"]):
        rules += affine(Rename, phis.format(i), f"quantizer.phis.{i}")
    return (*rules, *AutoencoderLayout(config["block_out_channels"], config["layers_per_block"]).rules())


def _phi_names(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return how a VQVAE names its convolutions `phi`, and their number: shared by some scales, by all, or by none."""
    start = "quantize.quant_resi."
    if f"{start}qresi.weight" in state:
        return f"{start}qresi", 1
    some = sum(key.startswith(f"{start}qresi_ls.") and key.endswith(".weight") for key in state)
    if some:
        return start + "qresi_ls.{}", some
    return start + "{}", sum(key.startswith(start) and key.endswith(".weight") for key in state)


def infer_tokenizer_config(state: Mapping[str, Tensor], scales: Sequence[int] = SCALES_256) -> dict[str, Any]:
    """Read a configuration off the shapes of an official state dict.

    Args:
        state: tensors in the official layout.
        scales: sides of the token maps, which the weights don't show; those of the transformer.

    Returns:
        Arguments of `MultiScaleVQ`.

    Raises:
        KeyMapError: the state dict is not in the official layout.
    """
    needed = ("encoder.conv_in.weight", "quantize.embedding.weight", "encoder.down.0.block.0.conv1.weight")
    check_has(state, needed, "a VAR tokenizer")

    def count(start: str) -> int:
        return len({key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)})

    levels = count("encoder.down.")
    vocab_size, latent_channels = state["quantize.embedding.weight"].shape
    return {
        "scales": tuple(scales),
        "latent_channels": latent_channels,
        "vocab_size": vocab_size,
        "block_out_channels": tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        "layers_per_block": count("encoder.down.0.block."),
        "num_phis": _phi_names(state)[1],
    }


def tokenizer_from_official(state: Mapping[str, Tensor], scales: Sequence[int] = SCALES_256) -> MultiScaleVQ:
    """Return a tokenizer from an official state dict.

    Args:
        state: tensors in the official layout.
        scales: sides of the token maps; one file serves the schedules of all transformers.

    Returns:
        The model in evaluation mode, in the dtype of the state dict.

    Raises:
        KeyMapError: keys or shapes don't fit the layout.
    """
    config = infer_tokenizer_config(state, scales)
    phis, _ = _phi_names(state)
    hits = state.get("quantize.ema_vocab_hit_SV")
    if hits is None or hits.shape[0] != len(config["scales"]):
        logger.info("The statistics of codebook use don't fit the schedule of scales; they start anew.")
        hits = torch.zeros(len(config["scales"]), config["vocab_size"])
    with torch.device("meta"):
        model = MultiScaleVQ(**config)
    state = {**state, "quantize.ema_vocab_hit_SV": hits}
    return load_exactly(model, convert(state, tokenizer_rules(config, phis)))


def tokenizer_to_official(model: MultiScaleVQ) -> dict[str, Tensor]:
    """Return the state dict of a tokenizer in the official layout, bit for bit what `tokenizer_from_official` read."""
    return convert(model.state_dict(), inverse(tokenizer_rules(model.config)))


# --------------------------------------------------------------------- shared


def load_exactly(model: ModelT, state: Mapping[str, Tensor]) -> ModelT:
    """Give a model on "meta" exactly these tensors and set it to evaluation.

    Args:
        model: without memory for its weights.
        state: a tensor for each of its keys.

    Returns:
        The model.

    Raises:
        KeyMapError: a tensor has another shape than the model's.
    """
    wrong = [key for key, value in model.state_dict().items() if key in state and state[key].shape != value.shape]
    if wrong:
        raise KeyMapError(
            f"{wrong[0]} has shape {tuple(state[wrong[0]].shape)}, which the rest of the file contradicts"
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(True).eval()


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Bring the floating tensors, the recomputed ones among them, to one dtype."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
