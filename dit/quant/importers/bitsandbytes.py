"""Checkpoints of bitsandbytes: NF4 and LLM.int8().

- NF4: `weight` uint8 (N * K / 2, 1), the earlier of two codes in the high nibble, `weight.absmax` with a scale for 64
  codes in the order of the rows, float32, or uint8 that `weight.nested_quant_map`, `weight.nested_absmax` and an offset
  turn into float32; the rest in JSON as bytes, `weight.quant_state.bitsandbytes__nf4`.
- int8: `weight` int8 (N, K) and `SCB` fp32 (N,), the largest weight of each row. Outlying inputs, which bitsandbytes
  multiplies in 16 bits, are not told apart here; with `activations="none"`, the default, all inputs have 16 bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.quant.formats.floats import NF4
from dit.quant.importers.contract import Checkpoint, Imported, ImportedLayer, Importer, layers_with, require
from dit.quant.loading import linear_at
from dit.quant.scheme import Scheme

_STATE = "weight.quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MOST_BYTES = 10_000
"""Of a quantization state in JSON."""


def recognizes_nf4(checkpoint: Checkpoint) -> bool:
    """Return whether there are weights of four bits."""
    return checkpoint.method in ("bitsandbytes", "") and any(f".{_STATE}" in name for name in checkpoint.tensors)


def read_nf4(checkpoint: Checkpoint, model: nn.Module, activations: str | None) -> Imported:
    """Read the layers; see `Importer`."""
    tensors = checkpoint.tensors
    other = sorted(name for name in tensors if f".{_STATE}" in name and not name.endswith("__nf4"))
    if other:
        kind = other[0].rpartition("__")[2]
        raise ValueError(f"{other[0]}: {kind} of bitsandbytes can't be held exactly; NF4 and int8 can be imported")
    names = layers_with(tensors, f"{_STATE}nf4")
    own = ("weight", "bias", f"{_STATE}nf4", *(f"weight.{part}" for part in _PARTS))
    known = {f"{name}.{one}" for name in names for one in own}
    layers = {name: _nf4(name, tensors, linear_at(model, name), activations) for name in names}
    return Imported(layers, {name: tensor for name, tensor in tensors.items() if name not in known})


def _nf4(name: str, tensors: Mapping[str, Tensor], linear: nn.Linear, activations: str | None) -> ImportedLayer:
    state = _state(f"{name}.{_STATE}nf4", tensors)
    rows, columns, group = linear.out_features, linear.in_features, state.get("blocksize")
    if state.get("shape") != [rows, columns]:
        raise ValueError(
            f"{name} is of shape {state.get('shape')!r:.60} in the checkpoint, the network has {[rows, columns]}"
        )
    if not isinstance(group, int) or group < 2 or columns % group:
        raise ValueError(f"{name} has blocks of {group!r:.40} weights, which do not divide its {columns} inputs")
    table = require(tensors, f"{name}.weight.quant_map", "an NF4 layer")
    if table.tolist() != torch.tensor(NF4).tolist():
        raise ValueError(f"{name}.weight.quant_map is not the table of NF4")
    packed = require(tensors, f"{name}.weight", "an NF4 layer")
    scales = _scales(name, tensors, state)
    if packed.dtype != torch.uint8 or packed.numel() * 2 != rows * columns or scales.numel() * group != rows * columns:
        raise ValueError(
            f"{name} has {packed.numel()} bytes and {scales.numel()} scales, not those of {rows} x {columns}"
        )
    codes = packed.reshape(rows, columns // 2)
    swapped = (codes << 4) | (codes >> 4)  # ours has the earlier code in the low nibble
    found = {"weight": swapped, "weight_scale": scales.reshape(rows, columns // group)}
    return ImportedLayer(Scheme("nf4_fp32", group, activations or "none"), found, tensors.get(f"{name}.bias"))


def _state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read a quantization state."""
    stored = tensors[name]
    try:
        if stored.numel() > MOST_BYTES:
            raise ValueError(f"it has {stored.numel()} bytes")
        found = json.loads(bytes(stored.flatten().tolist()))
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}")
    except ValueError as error:
        raise ValueError(f"{name} is no quantization state: {error}") from error
    return found


def _scales(name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Tensor:
    """Return the scales of all blocks, float32."""
    absmax = require(tensors, f"{name}.weight.absmax", "an NF4 layer").flatten()
    if absmax.dtype != torch.uint8:
        return absmax.float()
    table = require(tensors, f"{name}.weight.nested_quant_map", "a layer with nested scales").float()
    outer = require(tensors, f"{name}.weight.nested_absmax", "a layer with nested scales").float()
    group, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not isinstance(group, int) or not isinstance(offset, float) or outer.numel() != -(-absmax.numel() // group):
        raise ValueError(
            f"{name} has nested scales of blocks of {group!r:.40} and offset {offset!r:.40}, which don't fit"
        )
    if table.numel() != 256:
        raise ValueError(f"{name}.weight.nested_quant_map has {table.numel()} values, expected 256")
    return table[absmax.long()] * outer.repeat_interleave(group)[: absmax.numel()] + offset


def recognizes_int8(checkpoint: Checkpoint) -> bool:
    """Return whether there are weights of eight bits."""
    return checkpoint.method in ("bitsandbytes", "") and bool(layers_with(checkpoint.tensors, "SCB"))


def read_int8(checkpoint: Checkpoint, model: nn.Module, activations: str | None) -> Imported:
    """Read the layers; see `Importer`."""
    tensors = checkpoint.tensors
    names = layers_with(tensors, "SCB")
    known = {f"{name}.{own}" for name in names for own in ("weight", "bias", "SCB", "weight_format")}
    layers = {name: _int8(name, tensors, activations) for name in names}
    return Imported(layers, {name: tensor for name, tensor in tensors.items() if name not in known})


def _int8(name: str, tensors: Mapping[str, Tensor], activations: str | None) -> ImportedLayer:
    layout = tensors.get(f"{name}.weight_format")
    if layout is not None and int(layout) != 0:
        raise ValueError(f"{name}.weight_format is {int(layout)}: only weights in rows (0) can be imported")
    weight = require(tensors, f"{name}.weight", "an int8 layer")
    found = {"weight": weight, "weight_scale": tensors[f"{name}.SCB"].float().flatten() / 127}
    return ImportedLayer(Scheme("int8", 0, activations or "none"), found, tensors.get(f"{name}.bias"))


IMPORTERS = (
    Importer("bitsandbytes_4bit", recognizes_nf4, read_nf4),
    Importer("bitsandbytes_8bit", recognizes_int8, read_int8),
)
