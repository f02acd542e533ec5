"""Plain matrices of the tensors of SVDQuant's kernels, which lie in the order in which their threads read them.

The tiles are those of the weight packer in deepcompressor (mit-han-lab/deepcompressor, backend/nunchaku), for 4 bits: a
warp reads 128 outputs and 64 inputs, its 32 lanes are 8 along the outputs and 4 along the inputs, and a 32-bit register
holds 8 neighbouring inputs. All sizes are padded to whole tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128
"""Outputs of a tile, and what all sizes are padded to."""
TILE_INPUTS = 64


def unpack_codes(packed: Tensor) -> Tensor:
    """Return the 4-bit codes of a weight, uint8 (N, K), 0 to 15.

    Args:
        packed: `qweight`, int8 (N, K / 2).

    Raises:
        ValueError: the sizes are not those of whole tiles.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if rows % TILE or columns % TILE_INPUTS:
        raise ValueError(
            f"qweight {tuple(packed.shape)} does not consist of tiles of {TILE} x {TILE_INPUTS // 2} bytes"
        )
    data = packed.contiguous().view(torch.uint8)
    # tile of outputs, tile of inputs, pack of outputs, lane of outputs, lane of inputs, outputs of a pack (8 apart),
    # inputs of a pack (32 apart), bytes of a register
    data = data.view(rows // TILE, columns // TILE_INPUTS, 8, 8, 4, 2, 2, 4)
    codes = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)  # the last axis: 8 neighbouring inputs
    return codes.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, columns)


def unpack_scales(packed: Tensor, rows: int) -> Tensor:
    """Return scales of 16 bits, (N, G); biases and smoothing factors, (N, 1), lie in the same way.

    Args:
        packed: N * G numbers, of any shape.
        rows: N, padded.

    Raises:
        ValueError: the sizes don't fit.
    """
    _check_rows(packed, rows)
    data = packed.reshape(rows // TILE, -1, 8, 4, 2, 2)  # tile, group, 8 lanes, 4 lanes, pairs (8 apart), 2 neighbours
    return data.permute(0, 2, 4, 3, 5, 1).reshape(rows, -1)


def unpack_float8_scales(packed: Tensor, rows: int) -> Tensor:
    """Return float8 scales of groups of 16 inputs, (N, G).

    Args:
        packed: `wscales`, float8_e4m3fn, N * G numbers, of any shape.
        rows: N, padded.

    Raises:
        ValueError: the sizes don't fit.
    """
    _check_rows(packed, rows)
    data = packed.contiguous().view(torch.uint8)  # not every operation knows float8
    data = data.reshape(
        rows // TILE, -1, 8, 4, 4, 4
    )  # tile, 64 inputs, 8 lanes, 4 lanes (8 apart), 4 (32 apart), group
    return data.permute(0, 4, 3, 2, 1, 5).reshape(rows, -1).contiguous().view(torch.float8_e4m3fn)


def unpack_projection(packed: Tensor, *, down: bool) -> Tensor:
    """Return a projection of the low-rank branch.

    Args:
        packed: `proj_down` (K, r) or `proj_up` (N, r).
        down: which of them.

    Returns:
        (r, K), or (N, r).

    Raises:
        ValueError: the sizes are not those of whole tiles.
    """
    length, rank = packed.shape
    if length % 16 or rank % 16:
        raise ValueError(f"a projection of shape {tuple(packed.shape)} does not consist of tiles of 16 x 16")
    # Tiles are cut along (length, rank): 8 lanes, 4 lanes, halves of the tile's rows and columns, 2 neighbours.
    data = packed.reshape(length // 16, rank // 16, 8, 4, 2, 2, 2)
    tiles = data.permute(0, 1, 4, 2, 5, 3, 6).reshape(length // 16, rank // 16, 16, 16)
    if down:  # rows of a tile are ranks
        return tiles.permute(1, 2, 0, 3).reshape(rank, length)
    return tiles.permute(0, 2, 1, 3).reshape(length, rank)


def unpack_awq(packed: Tensor) -> Tensor:
    """Return the codes of a weight-only layer, uint8 (N, K), 0 to 15.

    Args:
        packed: `qweight`, int32 (N / 4, K / 2): of each 32 inputs the codes 0, 8, 16, 24 of a 16-bit word, then 1, 9,
            ..., and 64 inputs of four outputs side by side.

    Raises:
        ValueError: the sizes don't fit.
    """
    rows, columns = packed.shape[0] * 4, packed.shape[1] * 2
    if packed.dtype != torch.int32 or columns % 64:
        raise ValueError(
            f"qweight is {packed.dtype} {tuple(packed.shape)}, expected int32 (N / 4, K / 2) with K % 64 = 0"
        )
    data = (
        packed.contiguous().view(torch.uint8).view(rows // 4, columns // 64, 4, 2, 8, 2)
    )  # ..., 32 inputs, word, byte
    nibbles = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)  # (..., word, 4): inputs word, word + 8, ...
    return nibbles.transpose(-1, -2).permute(0, 2, 1, 3, 4, 5).reshape(rows, columns)


def _check_rows(packed: Tensor, rows: int) -> None:
    if rows % TILE or packed.numel() % rows:
        raise ValueError(f"{packed.numel()} packed numbers are not those of {rows} rows in tiles of {TILE}")
