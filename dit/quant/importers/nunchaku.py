"""Checkpoints of SVDQuant (arXiv 2411.05007): 4-bit weights beside a 16-bit low-rank branch, for any device.

Three kinds are read: the single files of nunchaku, of both generations of names; and the folders that diffusers loads
as `nunchaku_lite`, whose configuration names the layers. A layer is

    y = R ((x + shift) / smooth) + up down x + bias

with R in INT4 (groups of 64, 16-bit scales) or NVFP4 (groups of 16, float8 scales, and a scale a row or for all).
Activations of the published kernels have four bits too; the file says nothing of them, and here they keep their 16 bits
unless asked for otherwise. What the shift adds, where inputs come from a GELU, is joined with the bias. Modulation
layers are weight-only INT4 (AWQ): scale * code + zero.

In single files the rows of modulation layers alternate between shift, scale and gate, and 1 is added to the biases of
scales; both are undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit.quant.formats import weight_format
from dit.quant.formats.packing import pack_nibbles
from dit.quant.importers.contract import Checkpoint, Imported, ImportedLayer, Importer, layers_with, require
from dit.quant.importers.nunchaku_names import JOINED, Place, places, renamed_tensors, rest_names
from dit.quant.importers.nunchaku_packing import (
    unpack_awq,
    unpack_codes,
    unpack_float8_scales,
    unpack_projection,
    unpack_scales,
)
from dit.quant.loading import linear_at
from dit.quant.scheme import Scheme

LITE = "nunchaku_lite"
GELU_SHIFT = 0.171875
"""Added to the outputs of a GELU, so that their codes are unsigned, by nunchaku's INT4 kernels."""
GROUP, FLOAT_GROUP = 64, 16
_OWN = (
    "qweight", "wscales", "wzeros", "wcscales", "wtscale", "smooth_factor", "smooth_factor_orig", "proj_down",
    "proj_up", "bias",
)  # fmt: skip
UNKNOWN_ALPHA = 0.5
"""Stands in schemes of balanced layers; the exponent that a balance was found with is not stored in files."""


def recognizes(checkpoint: Checkpoint) -> bool:
    """Return whether there are packed weights with scales in nunchaku's names."""
    names = layers_with(checkpoint.tensors, "qweight")
    has_scales = any(f"{name}.wscales" in checkpoint.tensors for name in names)
    return checkpoint.method in (LITE, "svdquant", "nunchaku", "") and has_scales


def read(checkpoint: Checkpoint, model: nn.Module, activations: str | None) -> Imported:
    """Read the layers; see `Importer`."""
    tensors = renamed_tensors(checkpoint.tensors)
    sources = layers_with(tensors, "qweight")
    is_lite = checkpoint.method == LITE
    known = {f"{source}.{own}" for source in sources for own in _OWN}
    layers = {}
    for target, parts in places(model, sources).items():
        linear = linear_at(model, target)
        if f"{parts[0].source}.wzeros" in tensors:
            layers[target] = _awq(parts[0], tensors, linear, activations, is_lite)
        else:
            layers[target] = _joined(target, parts, tensors, model, activations, is_lite)
    rest = {name: tensor for name, tensor in tensors.items() if name not in known}
    return Imported(layers, rest_names(model, rest))


# ------------------------------------------------------------------------------ SVDQuant


@dataclass(frozen=True, eq=False)
class _Part:
    """A layer of a file, unpacked, or some rows of it.

    Attributes:
        codes: uint8 (N, K), 0 to 15.
        scales: of groups, (N, G).
        outer: scale of each row, fp32 (N,), of NVFP4.
        smooth: fp32 (K,).
        down: (r, K).
        up: (N, r).
        bias: fp32 (N,); None if there is none.
        shift: of the inputs.
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor | None
    smooth: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    shift: float = 0.0

    @property
    def is_float(self) -> bool:
        """Whether the codes are NVFP4's."""
        return self.outer is not None


def _joined(
    target: str,
    places_of: list[Place],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    activations: str | None,
    is_lite: bool,
) -> ImportedLayer:
    """Make a layer of its parts, side by side along the inputs."""
    linear = linear_at(model, target)
    rows, columns = linear.out_features, linear.in_features
    widths = _widths(places_of, columns, tensors)
    shifts = [0.0 if is_lite else _shift(place, model) for place in places_of]
    parts = [
        _part(place, tensors, (rows, width), shift)
        for place, width, shift in zip(places_of, widths, shifts, strict=True)
    ]
    first = parts[0]
    if any(part.is_float != first.is_float for part in parts):
        raise ValueError(f"{target} is made of INT4 and of NVFP4 layers, which can't be joined")
    codes = torch.cat([part.codes for part in parts], dim=1)  # (N, K)
    scales = torch.cat([part.scales.view(torch.uint8) if part.is_float else part.scales for part in parts], dim=1)
    balance = torch.cat([1 / part.smooth for part in parts])  # (K,)
    found: dict[str, Tensor]
    if first.outer is None:
        weights, found = _int4(codes, scales)
    else:
        outer, balance = _one_outer(target, parts, balance)
        weights = "nvfp4_rows"
        found = {
            "weight": pack_nibbles(codes),
            "weight_scale": scales.view(torch.float8_e4m3fn),
            "weight_scale_2": outer,
        }
    found["low_rank_down"] = torch.block_diag(*[part.down.float() for part in parts]).bfloat16()
    found["low_rank_up"] = torch.cat([part.up for part in parts], dim=1).bfloat16()
    is_balanced = not bool((balance == 1).all())
    if is_balanced:
        found["input_balance"] = balance
    group = FLOAT_GROUP if first.is_float else GROUP
    scheme = Scheme(
        weights,
        group,
        activations or "none",
        activation_group=GROUP if activations == "int4" else None,
        alpha=UNKNOWN_ALPHA if is_balanced else None,
        rank=len(found["low_rank_down"]),
        raw_branch=True,
    )
    return ImportedLayer(scheme, found, _bias(parts, scheme, found, columns))


def _part(place: Place, tensors: Mapping[str, Tensor], sizes: tuple[int, int], shift: float) -> _Part:
    """Unpack a layer of a file, without padding; `sizes` are those of the rows that are taken, and of the inputs."""
    name = place.source
    packed = tensors[f"{name}.qweight"]
    padded, width = packed.shape[0], packed.shape[1] * 2
    rows = slice(*(place.rows or (0, sizes[0])))
    if rows.stop > padded or sizes[1] > width:
        raise ValueError(
            f"{name}.qweight holds {padded} x {width} weights, the network has {sizes[0]} x {sizes[1]} there"
        )
    wscales = require(tensors, f"{name}.wscales", "an SVDQuant layer")
    smooth = require(tensors, f"{name}.smooth_factor", "an SVDQuant layer")
    down, up = (require(tensors, f"{name}.{own}", "an SVDQuant layer") for own in ("proj_down", "proj_up"))
    columns = slice(0, sizes[1])
    is_float = wscales.dtype == torch.float8_e4m3fn
    scales = unpack_float8_scales(wscales, padded) if is_float else unpack_scales(wscales, padded)
    groups = -(-sizes[1] // (FLOAT_GROUP if is_float else GROUP))
    bias = tensors.get(f"{name}.bias")
    return _Part(
        codes=unpack_codes(packed)[rows, columns].contiguous(),
        scales=_rows(scales, rows)[:, :groups].contiguous(),
        outer=_outer(name, tensors, padded)[rows] if is_float else None,
        smooth=unpack_scales(smooth, width).flatten()[columns].float(),
        down=unpack_projection(down, down=True)[:, columns],
        up=unpack_projection(up, down=False)[rows],
        bias=None if bias is None else unpack_scales(bias, padded).flatten()[rows].float(),
        shift=0.0 if is_float else shift,
    )


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return plain[rows].contiguous().view(tensor.dtype)


def _outer(name: str, tensors: Mapping[str, Tensor], padded: int) -> Tensor:
    """Return the scale of each row of NVFP4, fp32 (N,)."""
    whole, rows = tensors.get(f"{name}.wtscale"), tensors.get(f"{name}.wcscales")
    found = torch.ones(padded) if rows is None else unpack_scales(rows, padded).flatten().float()
    return found if whole is None else found * whole.float().flatten()


def _widths(places_of: list[Place], columns: int, tensors: Mapping[str, Tensor]) -> list[int]:
    """Return how many inputs of a layer each part has; only the last may be padded."""
    widths = [tensors[f"{place.source}.qweight"].shape[1] * 2 for place in places_of]
    widths[-1] = columns - sum(widths[:-1])
    if widths[-1] <= 0:
        raise ValueError(f"{places_of[0].source} has more inputs than {places_of[0].target} in the network: {columns}")
    return widths


def _shift(place: Place, model: nn.Module) -> float:
    """Return what nunchaku's own files add to the inputs of a layer: those behind a GELU have a shift."""
    if place.source.endswith(JOINED[-1]) and place.target.endswith("proj_out"):
        return GELU_SHIFT
    parent, _, child = place.target.rpartition(".")
    before = getattr(model.get_submodule(parent), "0", None) if child == "2" else None
    return GELU_SHIFT if type(before).__name__ in ("GELU", "ProjectedGELU") else 0.0


def _int4(codes: Tensor, scales: Tensor) -> tuple[str, dict[str, Tensor]]:
    """Return the format of INT4 codes (N, K) with scales (N, G), and its tensors."""
    short = scales.to(torch.bfloat16)
    is_short = torch.equal(short.float(), scales.float())  # scales of float16 have more digits
    found = {"weight": pack_nibbles(codes), "weight_scale": short if is_short else scales.float()}
    return "int4_group" if is_short else "int4_group_fp32", found


def _one_outer(target: str, parts: list[_Part], balance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row scales of joined NVFP4 parts, (N,), and a balance that makes them one.

    Raises:
        ValueError: the row scales of the parts are not multiples of each other.
    """
    outers = [part.outer for part in parts if part.outer is not None]
    factors = []
    for outer, part in zip(outers, parts, strict=True):
        factor = (outer / outers[0])[0]
        if not torch.equal(outers[0] * factor, outer):
            raise ValueError(f"{target} is made of NVFP4 layers whose row scales differ, which can't be joined")
        factors.append(factor.expand(len(part.smooth)))
    return outers[0].contiguous(), balance * torch.cat(factors)


def _bias(parts: list[_Part], scheme: Scheme, tensors: dict[str, Tensor], columns: int) -> Tensor | None:
    """Return the bias with what shifted inputs add, fp32 (N,)."""
    given = [part.bias for part in parts if part.bias is not None]
    total = torch.stack(given).sum(0) if given else None
    if not any(part.shift for part in parts):
        return total
    weight = weight_format(scheme.weights).unpack(tensors, columns, scheme.group)  # (N, K)
    shift = torch.cat([torch.full_like(part.smooth, part.shift) / part.smooth for part in parts])  # (K,)
    added = weight @ shift
    return added if total is None else total + added


# ------------------------------------------------------------------------------ AWQ


def _awq(
    place: Place, tensors: Mapping[str, Tensor], linear: nn.Linear, activations: str | None, is_lite: bool
) -> ImportedLayer:
    """Make a weight-only layer."""
    name, rows, columns = place.source, linear.out_features, linear.in_features
    codes = unpack_awq(tensors[f"{name}.qweight"])  # (N, K)
    if tuple(codes.shape) != (rows, columns):
        raise ValueError(f"{name} holds {tuple(codes.shape)} weights, the network has {(rows, columns)} there")
    groups = columns // GROUP
    scale, zero = (
        require(tensors, f"{name}.{own}", "an AWQ layer").T[:, :groups].float() for own in ("wscales", "wzeros")
    )
    bias = tensors.get(f"{name}.bias")
    bias = None if bias is None else bias.float()
    if not is_lite:
        order = _modulation_rows(name, rows, columns)  # (N,)
        codes, scale, zero = codes[order], scale[order], zero[order]
        bias = None if bias is None else bias[order] - _added(rows, columns)
    found = {"weight": pack_nibbles(codes), "weight_scale": scale.contiguous(), "weight_offset": zero.contiguous()}
    used = "none" if activations in (None, "int4", "nvfp4") else activations
    return ImportedLayer(Scheme("int4_affine", GROUP, used), found, bias)


def _modulation_rows(name: str, rows: int, columns: int) -> Tensor:
    """Return the rows of a single file's modulation layer in the order of a network, (N,).

    Raises:
        ValueError: it has neither 3 nor 6 outputs for each input.
    """
    splits, left = divmod(rows, columns)
    if left or splits not in (3, 6):
        raise ValueError(f"{name} has {rows} outputs and {columns} inputs; expected the 3 or 6 parts of a modulation")
    return torch.arange(rows).view(columns, splits).T.flatten()


def _added(rows: int, columns: int) -> Tensor:
    """Return what single files add to the biases of a modulation: 1 to those of scales, (N,)."""
    splits = rows // columns
    added = torch.zeros(splits, columns)
    added[[1, -2]] = 1
    return added.flatten()


IMPORTERS = (Importer("nunchaku", recognizes, read),)
