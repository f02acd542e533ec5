"""Convert LoRA files from any dialect to another, without losing a key.

A file is read into layers by diffusers' names, whatever it calls them, and written from there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from dit.lora.detection import choose
from dit.lora.dialects import DIALECTS, DialectName, adapter_config, file_metadata
from dit.lora.files import (
    METADATA_KEY,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    LoraFile,
    LoraFileError,
    LoraMisfitError,
    check_values,
    find_lora_file,
    lacks_alpha,
    other_kind,
    read_lora_file,
)
from dit.lora.layers import LoraLayer, check_kind, complete, gather
from dit.lora.names import RULES, bare_name, to_diffusers, to_original

logger = logging.getLogger(__name__)

FAMILY_KEY = "lora_family"
"""Metadata of a written file: the family, so that converting it again needs no guess."""

TEXT_ENCODERS = ("lora_te", "text_encoder", "text_model.", "text_encoders.")
LISTED = 12
"""Keys that a message lists."""


@dataclass(frozen=True)
class Lora:
    """A LoRA independent of a dialect.

    Attributes:
        file: name of the file that it was read from.
        family: of the network, see `dit.lora.names.RULES`.
        layers: by diffusers' names.
        metadata: of the file, without what belongs to its dialect.
        certain: it can be of no other family.
    """

    file: str
    family: str
    layers: dict[str, LoraLayer]
    metadata: dict[str, str]
    certain: bool = True


def convert(
    path: str | os.PathLike, to: DialectName, *, output: str | os.PathLike | None = None, family: str | None = None
) -> Path:
    """Convert a LoRA file to another dialect; what it does to a layer's weight stays the same.

    Args:
        path: a safetensors file of any dialect, or a folder with one.
        to: "diffusers", "peft", "comfyui", "kohya" or "onetrainer".
        output: file to write, or for "peft" also a folder; None writes NAME-DIALECT beside the source.
        family: of the network, e.g. "flux"; None finds it by the names of the layers.

    Returns:
        The file that was written.

    Raises:
        LoraFileError: damaged, incomplete, not made of low-rank factors, or with keys that have no place in the other
            dialect; the message lists them. Also where several families fit and give different files.
        ValueError: an unknown dialect or family, or a name to write that isn't one of a safetensors file.
        FileExistsError: the file to write is there already.
    """
    if to not in DIALECTS:
        raise ValueError(f"to={to!r}, expected one of {', '.join(DIALECTS)}.")
    source = find_lora_file(Path(path).expanduser())
    target = _target(source, to, output)
    lora = read(source, to, family=family)
    return write(lora, to, target)


# ------------------------------------------------------------------------ reading


def read(path: Path, to: str = "comfyui", *, family: str | None = None) -> Lora:
    """Read a LoRA file of any dialect into diffusers' layers.

    Args:
        path: the file.
        to: the dialect that it is read for: several families may do where they give the same file.
        family: of the network; None finds it.

    Raises:
        LoraFileError: see `convert`.
        ValueError: an unknown family.
    """
    if family is not None and family not in RULES:
        raise ValueError(f"family={family!r}, expected one of {', '.join(RULES)}.")
    lora = read_lora_file(path)
    check_values(lora)
    check_kind(lora)
    kind = other_kind(lora.tensors)
    if kind is not None:
        raise LoraFileError(
            f"{lora.name} is {kind}, not a LoRA of two low-rank factors: no other dialect holds it. Load it where it "
            "was made for, or train a LoRA."
        )
    if lacks_alpha(lora):
        logger.warning("%s has no %s beside it, so its alpha is not known: the scale is 1.", lora.name, PEFT_CONFIG)
    found, unknown = gather(lora)
    named = {written: bare_name(written) for written in found}
    layers = {written: complete(lora, named[written][0], parts) for written, parts in found.items()}
    fits: dict[str, dict[str, LoraLayer]] = {}
    misfits: dict[str, list[str]] = {}
    for name in RULES if family is None else (family,):
        placed, homeless = _place(lora.name, name, layers, named, strict=family is not None)
        misfits[name] = [key for written in homeless for key in found[written].keys.values()]
        if not homeless:
            fits[name] = placed
    if unknown or not fits:
        raise LoraMisfitError(_misfit(lora, unknown, misfits, family))
    name, certain = choose(lora, fits, lambda name: DIALECTS[to].tensors(_in_dialect(fits[name], name, to)))
    metadata = {key: value for key, value in lora.metadata.items() if key not in (METADATA_KEY, "format")}
    return Lora(lora.name, name, fits[name], metadata, certain)


def _place(
    file: str, family: str, layers: Mapping[str, LoraLayer], named: Mapping[str, tuple[str, bool]], strict: bool
) -> tuple[dict[str, LoraLayer], list[str]]:
    """Give layers diffusers' names, and list those that the family has no layer for.

    Raises:
        LoraFileError: two LoRAs for a layer; where `strict`, also a fused layer that can't be split.
    """
    placed: dict[str, LoraLayer] = {}
    homeless = []
    for written, layer in layers.items():
        try:
            pieces = to_diffusers(RULES[family], *named[written], layer)
        except LoraFileError as error:
            if strict:
                raise LoraFileError(f"{file}, read as one of {family}: {error}") from error
            pieces = None
        if pieces is None:
            homeless.append(written)
            continue
        for name, piece in pieces.items():
            if name in placed:
                raise LoraFileError(f"{file} holds two LoRAs for the layer {name}, one of them {written!r}.")
            placed[name] = piece
    return placed, homeless


def _misfit(lora: LoraFile, unknown: list[str], misfits: Mapping[str, list[str]], family: str | None) -> str:
    """Describe the keys that have no place, for the family that most of them fit."""
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    keys = sorted({*unknown, *misfits[nearest]})
    some = ", ".join(keys[:LISTED]) + (f" and {len(keys) - LISTED} more" if len(keys) > LISTED else "")
    whose = f"the family {family}" if family is not None else f"any family that is known here (nearest: {nearest})"
    text = f"{lora.name}: {len(keys)} of {len(lora.tensors)} keys are no part of a LoRA for {whose}: {some}."
    if any(key.startswith(TEXT_ENCODERS) for key in keys):
        text += " Some are of a text encoder; only the LoRA of the transformer is converted."
    if any(key.endswith((".diff", ".w_norm", ".b_norm")) for key in keys):
        text += " Some are whole differences of weights, which are no LoRA."
    return text + " Nothing was written; take those keys out, or name another family."


# ------------------------------------------------------------------------ writing


def write(lora: Lora, to: str, target: Path) -> Path:
    """Write a LoRA in a dialect.

    Args:
        lora: what to write.
        to: the dialect.
        target: file; for "peft" its configuration goes beside it.

    Returns:
        The file.

    Raises:
        LoraFileError: the dialect can't hold it.
    """
    layers = _in_dialect(lora.layers, lora.family, to)
    similar = _similar_names(lora)
    metadata = {
        **lora.metadata,
        **file_metadata(to, lora.file, lora.layers, similar),
        "format": "pt",
        **({FAMILY_KEY: lora.family} if lora.certain else {}),
    }
    config = adapter_config(lora.file, lora.layers, similar) if to == "peft" else None
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    try:
        save_file(DIALECTS[to].tensors(layers), unfinished, metadata=metadata)
        if config is not None:
            target.with_name(PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _in_dialect(layers: Mapping[str, LoraLayer], family: str, to: str) -> dict[str, LoraLayer]:
    """Name layers as a dialect does."""
    if not DIALECTS[to].original:
        return dict(layers)
    try:
        return to_original(RULES[family], layers)
    except LoraFileError as error:
        raise LoraFileError(f"{family} as {to}: {error}") from error


def _similar_names(lora: Lora) -> list[str]:
    """Return names of the family's layers, in every block that the LoRA has, for PEFT's matching by their ends."""
    return [part for rule in RULES[lora.family] for part in rule.parts if part not in lora.layers]


def _target(source: Path, to: str, output: str | os.PathLike | None) -> Path:
    """Return the file to write.

    Raises:
        ValueError: not a name of a safetensors file.
        FileExistsError: it is there.
    """
    if output is None:
        stem = f"{source.stem}-{to}"
        target = source.with_name(stem) / PEFT_WEIGHTS if to == "peft" else source.with_name(f"{stem}.safetensors")
    else:
        target = Path(output).expanduser()
        if target.suffix != ".safetensors":
            if to != "peft":
                raise ValueError(f"output={str(output)!r}: expected the name of a file that ends in .safetensors.")
            target = target / PEFT_WEIGHTS
    there = [file for file in (target, target.with_name(PEFT_CONFIG)) if file.exists()]
    if target in there or (to == "peft" and there):
        raise FileExistsError(f"{there[0]} is there already; remove it, or name another file to write.")
    return target
