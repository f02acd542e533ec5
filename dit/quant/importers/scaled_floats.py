"""Checkpoints with scaled floats: Black Forest Labs' `fp8r` and `nvfp4`, and ModelOpt's FP8 and NVFP4.

A linear layer is quantized when its weight comes with scales:

- fp8: `weight` float8_e4m3fn (N, K), `weight_scale` fp32, one for each row (N,) or one for all; `input_scale`, if any,
  is a static scale of the activations.
- nvfp4: `weight` uint8 (N, K / 2), even inputs in low nibbles, `weight_scale` float8_e4m3fn (N, K / 16), and
  `weight_scale_2`, an fp32 scalar; `input_scale` belongs to Blackwell's products and is left aside.

Names are those of the network, or those of the publisher's single file, which diffusers translates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dit.quant.importers.contract import Checkpoint, Imported, ImportedLayer, Importer, layers_with, require
from dit.quant.importers.rows import Rows, in_names_of
from dit.quant.scheme import Scheme

_METHODS = ("bfl", "modelopt", "")
_SCALES = ("weight_scale", "weight_scale_2", "input_scale")


def recognizes(checkpoint: Checkpoint) -> bool:
    """Return whether there are weights with scales in one of the layouts."""
    names = layers_with(checkpoint.tensors, "weight_scale")
    weights = [checkpoint.tensors.get(f"{name}.weight") for name in names]
    kinds = {one.dtype for one in weights if one is not None}
    return checkpoint.method in _METHODS and bool(names) and kinds <= {torch.float8_e4m3fn, torch.uint8}


def read(checkpoint: Checkpoint, model: nn.Module, activations: str | None) -> Imported:
    """Read the layers; see `Importer`."""
    names = layers_with(checkpoint.tensors, "weight_scale")
    layers, rest = in_names_of(model, checkpoint.tensors, names, _SCALES)
    return Imported(
        {target: _layer(target, rows, checkpoint.tensors, activations, rest) for target, rows in layers.items()}, rest
    )


def _layer(
    target: str, rows: list[Rows], tensors: Mapping[str, Tensor], activations: str | None, rest: dict[str, Tensor]
) -> ImportedLayer:
    bias = rest.pop(f"{target}.bias", None)
    weights = [rows_of.take(require(tensors, f"{rows_of.source}.weight", "a quantized layer")) for rows_of in rows]
    weight = torch.cat([one.view(torch.uint8) for one in weights]).view(weights[0].dtype)  # (N, K) or (N, K / 2)
    if weight.dtype == torch.uint8:
        return ImportedLayer(Scheme("nvfp4", 16, activations or "none"), _nvfp4(target, weight, rows, tensors), bias)
    scales = [_row_scales(rows_of, tensors) for rows_of in rows]
    found = {"weight": weight, "weight_scale": torch.cat(scales)}
    static = {float(tensors[name]) for rows_of in rows if (name := f"{rows_of.source}.input_scale") in tensors}
    scheme = Scheme("fp8", 0, activations or "fp8", static=len(static) == 1 and activations in (None, "fp8"))
    if scheme.static:
        found["input_scale"] = torch.tensor(list(static))
    return ImportedLayer(scheme, found, bias)


def _row_scales(rows: Rows, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the scale of each row, (n,)."""
    scale = tensors[f"{rows.source}.weight_scale"].float()
    count = len(tensors[f"{rows.source}.weight"])
    if scale.numel() not in (1, count):
        raise ValueError(
            f"{rows.source}.weight_scale is {tuple(scale.shape)}, expected one value or {count}: a scale a block of "
            "float8 weights can't be imported"
        )
    return rows.take(scale.flatten().expand(count)).contiguous()


def _nvfp4(target: str, weight: Tensor, rows: list[Rows], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an NVFP4 layer."""
    outer = [require(tensors, f"{one.source}.weight_scale_2", "an NVFP4 layer").float().reshape(()) for one in rows]
    if any(not torch.equal(one, outer[0]) for one in outer):
        raise ValueError(f"{target} is made of layers with different weight_scale_2, which can't be imported")
    scales = [one.take(tensors[f"{one.source}.weight_scale"]).view(torch.uint8) for one in rows]
    return {
        "weight": weight,
        "weight_scale": torch.cat(scales).view(torch.float8_e4m3fn),
        "weight_scale_2": outer[0].clone(),
    }


IMPORTER = Importer("bfl", recognizes, read)
