"""Derive a row for a transformer that the table doesn't list, as far as its structure allows."""

import re
from dataclasses import replace
from inspect import signature

from torch import nn

from dit.runtime.families.layouts import Inputs, patched
from dit.runtime.families.modules import is_attention
from dit.runtime.families.partial import SEQUENCES
from dit.runtime.families.schema import TIMESTEP_NAME, AttentionPattern, BlockList, Family
from dit.runtime.families.tokens import Kind, TokenLayout
from dit.runtime.state import named_layers

BLOCK_LIST_NAMES = ("transformer_blocks", "blocks", "layers")
"""Names that block lists usually have."""

TRUNK = re.compile(r"((joint|double|dual|single)_)?((transformer|stream)_)?(blocks|layers)")
"""Names of lists whose blocks hand the streams on from one to the next. Lists of other names beside them (control
branches, adapters, refiners) only feed the trunk."""

LATENTS = ("hidden_states", "x", "sample", "latents", "vision_tokens", "bb_ca")
"""Names of arguments with the noisy latents, the usual one first."""


class UnknownFamilyError(ValueError):
    """The table doesn't list the class, and its structure doesn't tell what a row needs."""


def detect(model: nn.Module) -> Family:
    """Guess a row from the structure of a network.

    Args:
        model: the bare network.

    Returns:
        A row with `generic` set. It knows blocks and attention layers, and the grid where the latents are plain
        tensors; guidance and timestep scale are unknown.

    Raises:
        UnknownFamilyError: no list of blocks with attention layers in it.
    """
    modules = dict(named_layers(model))
    attention = {name: module for name, module in modules.items() if is_attention(module)}
    paths = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and "." not in name]
    holding = [path for path in paths if any(name.startswith(path + ".") for name in attention)]
    if not holding:
        raise UnknownFamilyError(
            f"{type(model).__name__} is not in the table of families and its structure doesn't tell enough: looked for "
            "a list of blocks (a direct child that is a ModuleList, usually called "
            f"{', '.join(BLOCK_LIST_NAMES)}) with attention layers in it (to_q, to_k and to_v), and found "
            f"{'no ModuleList' if not paths else 'none in ' + ', '.join(paths)}. Add a row to dit/runtime/families."
        )
    known = SEQUENCES.get(type(model).__name__)
    if known is not None:
        lists = [
            BlockList(one.path, "text", refiner=True) if one.path == known.text_blocks else one
            for one in _block_lists(holding)
        ]
        return replace(detect_inputs(model), block_lists=tuple(lists), attention=known.attention)
    takes = signature(type(model).forward).parameters
    kinds = _kinds({n: m for n, m in attention.items() if n.startswith(tuple(p + "." for p in holding))}, takes)
    patterns = tuple(AttentionPattern(pattern, kind) for pattern, kind in kinds.items())
    return replace(detect_inputs(model), block_lists=_block_lists(holding), attention=patterns)


def detect_inputs(model: nn.Module) -> Family:
    """Guess the meaning of a network's call arguments, whatever it is made of.

    Args:
        model: the bare network.

    Returns:
        A row with `generic` set, without blocks and attention layers.
    """
    takes = signature(type(model).forward).parameters
    times = [name for name in takes if TIMESTEP_NAME.fullmatch(name)]
    return Family(
        name=f"generic:{type(model).__name__}",
        transformer=type(model).__name__,
        package=type(model).__module__,
        pipelines=(),
        block_lists=(),
        attention=(),
        layout=_layout,
        timestep=None,
        latent_argument=next((name for name in LATENTS if name in takes), LATENTS[0]),
        text_argument="encoder_hidden_states" if "encoder_hidden_states" in takes else None,
        timestep_argument="timestep" if "timestep" in takes or not times else times[0],
        generic=True,
    )


def _block_lists(paths: list[str]) -> tuple[BlockList, ...]:
    """Return the lists in the order of execution: as they were made, blocks of one stream behind those of two.

    Args:
        paths: names in the order in which the network made its parts.
    """
    trunk = [path for path in paths if TRUNK.fullmatch(path)] or paths
    trunk.sort(key=lambda path: path.startswith("single_"))
    beside = [path for path in paths if path not in trunk]
    return (*(BlockList(path, refiner=True) for path in beside), *(BlockList(path) for path in trunk))


def _kinds(attention: dict[str, nn.Module], takes: object) -> dict[str, Kind]:
    """Return the layer name patterns with their kinds; "unknown" where a text may or may not be in the sequence."""
    has_cross = any(_is_cross(module) for module in attention.values())
    plain: Kind = "self" if has_cross or "encoder_hidden_states" not in takes else "unknown"  # pyright: ignore
    kinds: dict[str, Kind] = {}
    for name, module in attention.items():
        pattern = re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name))
        kind: Kind = "cross" if _is_cross(module) else "joint" if "add_k_proj" in module._modules else plain
        kinds[pattern if kinds.get(pattern, kind) == kind else re.escape(name)] = kind
    return kinds


def _is_cross(module: nn.Module) -> bool:
    """Return whether keys come from another sequence: declared by the layer, or shown by its projections' widths."""
    said = getattr(module, "is_cross_attention", None)
    if said is not None:
        return bool(said)
    widths = [getattr(module._modules.get(name), "in_features", None) for name in ("to_q", "to_k")]
    return None not in widths and widths[0] != widths[1]


def _layout(model: nn.Module, inputs: Inputs) -> TokenLayout:
    known = SEQUENCES.get(type(model).__name__)
    if known is not None:
        return known.layout(model, inputs)
    latents, config = inputs.get("hidden_states"), getattr(model, "config", {})
    if getattr(latents, "ndim", 0) not in (4, 5) or "patch_size" not in config:
        raise UnknownFamilyError(
            f"the token grid of {type(model).__name__} is not known: looked for `hidden_states` of shape (B, C, H, W) "
            "or (B, C, T, H, W) and `patch_size` in its config. Add a row to dit/runtime/families."
        )
    text = "unknown" if inputs.get("encoder_hidden_states") is not None else "none"
    return patched(text, size_t="patch_size_t")(model, inputs)
