"""Checkpoints of torchao as diffusers saves them: int8 and float8 weights with a scale a row, and unpacked int4.

A tensor subclass is stored as its parts: `NAME._weight_qdata`, `NAME._weight_scale`, `NAME._weight_zero_point`. Which
class it is stands in the file's metadata; here dtypes and shapes say enough.

- int8: qdata int8 (N, K), scale (N, 1), zero points of 0.
- float8: qdata float8_e4m3fn (N, K), scale (N, 1) or (1, 1).
- int4 "unpacked to int8": as int8, with codes from -8 to 7 and scales (N, K / g).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.quant.formats.packing import pack_nibbles
from dit.quant.importers.contract import Checkpoint, Imported, ImportedLayer, Importer, layers_with, require
from dit.quant.scheme import Scheme

_PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")


def recognizes(checkpoint: Checkpoint) -> bool:
    """Return whether weights are stored in torchao's parts."""
    return checkpoint.method in ("torchao", "") and bool(layers_with(checkpoint.tensors, _PARTS[0]))


def read(checkpoint: Checkpoint, model: nn.Module, activations: str | None) -> Imported:
    """Read the layers; see `Importer`."""
    tensors = checkpoint.tensors
    names = layers_with(tensors, _PARTS[0])
    known = {f"{name}.{own}" for name in names for own in (*_PARTS, "bias")}
    odd = sorted(one for one in tensors if one.rpartition(".")[2].startswith("_weight_") and one not in known)
    if odd:
        raise ValueError(f"{odd[0]} belongs to a layout of torchao that can't be imported; known are int8 and float8")
    layers = {name: _layer(name, checkpoint, activations) for name in names}
    return Imported(layers, {name: tensor for name, tensor in tensors.items() if name not in known})


def _layer(name: str, checkpoint: Checkpoint, activations: str | None) -> ImportedLayer:
    tensors, (data, scale, zero) = checkpoint.tensors, _PARTS
    codes = tensors[f"{name}.{data}"]
    scales = require(tensors, f"{name}.{scale}", "a layer of torchao")
    zeros = tensors.get(f"{name}.{zero}")
    if zeros is not None and bool((zeros != 0).any()):
        raise ValueError(f"{name} has zero points that aren't 0: asymmetric weights of torchao can't be imported")
    if (
        codes.ndim != 2
        or scales.ndim != 2
        or scales.shape[0] not in (1, len(codes))
        or codes.shape[1] % scales.shape[1]
    ):
        raise ValueError(f"{name} has codes {tuple(codes.shape)} and scales {tuple(scales.shape)}, not those of groups")
    bias = tensors.get(f"{name}.bias")
    if scales.shape[1] != 1 or _bits(checkpoint, name) == 4:
        return ImportedLayer(*_groups(name, codes, scales, activations), bias)
    weights = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(codes.dtype)
    if weights is None:
        raise ValueError(f"{name} has codes of {codes.dtype}, expected int8 or float8_e4m3fn")
    quantized = weights if _is_dynamic(checkpoint, name) else "none"
    row = scales.float().flatten().expand(len(codes)).contiguous()
    return ImportedLayer(Scheme(weights, 0, activations or quantized), {"weight": codes, "weight_scale": row}, bias)


def _groups(name: str, codes: Tensor, scales: Tensor, activations: str | None) -> tuple[Scheme, dict[str, Tensor]]:
    """Return the scheme and tensors of int8 codes in groups, which must be those of 4 bits."""
    if codes.dtype != torch.int8 or int(codes.min()) < -8 or int(codes.max()) > 7:
        raise ValueError(f"{name} has groups of codes of more than 4 bits, which can't be imported")
    group = codes.shape[1] // scales.shape[1]
    packed = pack_nibbles(codes.view(torch.uint8) & 15)
    is_short = scales.dtype == torch.bfloat16
    stored = scales.expand(len(codes), -1).contiguous()
    scheme = Scheme("int4_group" if is_short else "int4_group_fp32", group, activations or "none")
    return scheme, {"weight": packed, "weight_scale": stored if is_short else stored.float()}


def _described(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    """Return what the metadata say of a weight."""
    try:
        found = json.loads(checkpoint.metadata.get(f"{name}.weight", "{}"))
    except ValueError as error:
        raise ValueError(f"the metadata of {name}.weight are no JSON: {error}") from error
    data = found.get("_data") if isinstance(found, dict) else None
    return data if isinstance(data, dict) else {}


def _is_dynamic(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether activations are quantized too: as the metadata say, or else the configuration."""
    described = _described(checkpoint, name)
    if "act_quant_kwargs" in described:
        return described["act_quant_kwargs"] is not None
    return "DynamicActivation" in json.dumps(dict(checkpoint.config))


def _bits(checkpoint: Checkpoint, name: str) -> int:
    target = _described(checkpoint, name).get("target_dtype")
    return 4 if isinstance(target, dict) and target.get("_data") == "int4" else 8


IMPORTER = Importer("torchao", recognizes, read)
