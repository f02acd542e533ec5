"""Checkpoints of SDNQ: int8, int4 and uint4, float8, with a low-rank branch or without.

The layouts were found by quantizing layers and looking at what they multiply by:

- int8 and float8_e4m3fn: `weight` (N, K) and `scale` (N, 1); for SDNQ's integer products (K, N) and (1, N).
- uint4 and int4: `weight` uint8 (N * K / 2,), the earlier of two codes in the low nibble, `scale` (N, K / g, 1);
  uint4 is scale * code + `zero_point`, int4 scale * (code - 8).
- with `use_svd`: the weight is the above plus `svd_up` (N, r) times `svd_down` (r, K); these are rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit.quant.importers.contract import Checkpoint, Imported, ImportedLayer, Importer, layers_with
from dit.quant.loading import linear_at
from dit.quant.scheme import Scheme

_PARTS = ("weight", "bias", "scale", "zero_point", "svd_up", "svd_down")
_UNKNOWN = ("use_hadamard", "use_codebook", "use_codebook_scale")
_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn)
_KNOWN = "int8, int4, uint4 and float8_e4m3fn"


def recognizes(checkpoint: Checkpoint) -> bool:
    """Return whether there are codes with a `scale` beside them."""
    return checkpoint.method in ("sdnq", "") and bool(_quantized(checkpoint.tensors))


def _quantized(tensors: Mapping[str, Tensor]) -> list[str]:
    names = layers_with(tensors, "scale")
    return [name for name in names if f"{name}.weight" in tensors and tensors[f"{name}.weight"].dtype in _CODES]


def read(checkpoint: Checkpoint, model: nn.Module, activations: str | None) -> Imported:
    """Read the layers; see `Importer`."""
    for option in _UNKNOWN:
        if checkpoint.config.get(option):
            raise ValueError(f"the checkpoint was made with {option}: its weights can't be held as they are")
    tensors, names = checkpoint.tensors, _quantized(checkpoint.tensors)
    known = {f"{name}.{own}" for name in names for own in _PARTS}
    multiplies = "int8" if checkpoint.config.get("use_quantized_matmul") else "none"
    layers = {name: _layer(name, checkpoint, linear_at(model, name), activations or multiplies) for name in names}
    return Imported(layers, {name: tensor for name, tensor in tensors.items() if name not in known})


def _layer(name: str, checkpoint: Checkpoint, linear: nn.Linear, activations: str) -> ImportedLayer:
    tensors = checkpoint.tensors
    weight, scale, zero = tensors[f"{name}.weight"], tensors[f"{name}.scale"], tensors.get(f"{name}.zero_point")
    rows, columns = linear.out_features, linear.in_features
    found: dict[str, Tensor]
    if weight.dtype == torch.uint8:
        scheme, found = _four_bits(name, weight, scale, zero, (rows, columns), _kind(checkpoint, name))
    elif weight.ndim == 2 and zero is None and scale.numel() == rows:
        # (1, N) beside a weight (K, N) is the layout of SDNQ's own products.
        plain = weight.T if tuple(scale.shape) == (1, rows) and rows > 1 else weight
        kind = "int8" if weight.dtype == torch.int8 else "fp8"
        scheme, found = (
            {"weights": kind, "group": 0},
            {"weight": plain.contiguous(), "weight_scale": scale.flatten().float()},
        )
    else:
        raise ValueError(
            f"{name} has codes {tuple(weight.shape)} of {weight.dtype} and scales {tuple(scale.shape)}; of SDNQ's "
            f"formats {_KNOWN} can be imported, eight bits with a scale a row"
        )
    up, down = tensors.get(f"{name}.svd_up"), tensors.get(f"{name}.svd_down")
    if up is not None and down is not None:
        found |= {"low_rank_up": up.bfloat16(), "low_rank_down": down.bfloat16()}
        scheme["rank"] = len(down)
    used = activations if scheme["weights"] == "int8" or activations != "int8" else "none"
    return ImportedLayer(Scheme(**scheme, activations=used), found, tensors.get(f"{name}.bias"))


def _kind(checkpoint: Checkpoint, name: str) -> str:
    """Return the format of a layer's codes, or "" where the configuration does not say it."""
    by_layer = checkpoint.config.get("modules_dtype_dict")
    if isinstance(by_layer, Mapping) and any(by_layer.values()):
        raise ValueError(f"the checkpoint has formats by layer ({name} ...), which can't be told apart")
    return str(checkpoint.config.get("weights_dtype") or "")


def _four_bits(
    name: str, weight: Tensor, scale: Tensor, zero: Tensor | None, sizes: tuple[int, int], kind: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return fields of the scheme, and tensors, of codes of four bits."""
    rows, columns = sizes
    expected = "int4" if zero is None else "uint4"
    if kind != expected:
        raise ValueError(
            f"{name} is stored as {kind or 'codes of 4 bits of a kind that no configuration names'}; of SDNQ's formats "
            f"{_KNOWN} can be imported"
        )
    groups = scale.shape[1] if scale.ndim >= 2 else 0
    fits = scale.shape[0] == rows and groups and scale.numel() == rows * groups and columns % groups == 0
    if weight.numel() * 2 != rows * columns or not fits or (zero is not None and zero.shape != scale.shape):
        raise ValueError(
            f"{name} has codes {tuple(weight.shape)} and scales {tuple(scale.shape)}, not those of 4 bits for {rows} x "
            f"{columns}; of SDNQ's formats {_KNOWN} can be imported"
        )
    packed, group = weight.reshape(rows, columns // 2), columns // groups
    step = scale.reshape(rows, groups).float()
    if zero is not None:
        found = {"weight": packed, "weight_scale": step, "weight_offset": zero.reshape(rows, groups).float()}
        return {"weights": "int4_affine", "group": group}, found
    # Codes less 8 in two's complement: the highest bit of each is turned.
    return {"weights": "int4_group_fp32", "group": group}, {"weight": packed ^ 0x88, "weight_scale": step}


IMPORTER = Importer("sdnq", recognizes, read)
