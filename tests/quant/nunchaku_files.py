"""Files as nunchaku writes them: layers with known codes and scales, packed as deepcompressor's packer does."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

GROUP, FLOAT_GROUP = 64, 16
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack_codes(codes: Tensor) -> Tensor:
    """Pack 4-bit codes (N, K), of any sign, to int8 (N, K / 2)."""
    rows, columns = codes.shape
    tiles = (codes.long() & 15).reshape(rows // 128, 8, 2, 8, columns // 64, 2, 4, 8)
    registers = tiles.permute(0, 4, 1, 3, 6, 2, 5, 7)  # the last axis: the eight codes of a register
    low, high = registers[..., 0::2], registers[..., 1::2]
    return (low | (high << 4)).to(torch.uint8).reshape(rows, columns // 2).view(torch.int8)


def pack_scales(scales: Tensor) -> Tensor:
    """Pack 16-bit scales (N, G) to (G, N); biases and smoothing factors (N, 1) to (1, N)."""
    rows, groups = scales.shape
    return scales.reshape(rows // 128, 8, 2, 4, 2, groups).permute(0, 5, 1, 3, 2, 4).reshape(groups, rows)


def pack_float8_scales(scales: Tensor) -> Tensor:
    """Pack float8 scales (N, G) to (G, N)."""
    rows, groups = scales.shape
    data = scales.view(torch.uint8).reshape(rows // 128, 4, 4, 8, groups // 4, 4)
    return data.permute(0, 4, 3, 2, 1, 5).reshape(groups, rows).contiguous().view(torch.float8_e4m3fn)


def pack_projection(projection: Tensor, *, down: bool) -> Tensor:
    """Pack a projection (r, K) to (K, r), or (N, r) to (N, r)."""
    if down:
        rank, length = projection.shape
        tiles = projection.reshape(rank // 16, 16, length // 16, 16).permute(2, 0, 1, 3)
    else:
        length, rank = projection.shape
        tiles = projection.reshape(length // 16, 16, rank // 16, 16).permute(0, 2, 1, 3)
    lanes = tiles.reshape(length // 16, rank // 16, 2, 8, 2, 4, 2)
    return lanes.permute(0, 1, 3, 5, 2, 4, 6).reshape(length, rank)


def pack_awq(codes: Tensor) -> Tensor:
    """Pack codes (N, K), 0 to 15, of weight-only layers to int32 (N / 4, K / 2)."""
    rows, columns = codes.shape
    parts = codes.long().reshape(rows, columns // 32, 4, 8)
    words = parts[:, :, 0] | (parts[:, :, 1] << 4) | (parts[:, :, 2] << 8) | (parts[:, :, 3] << 12)  # (N, K / 32, 8)
    ordered = words.reshape(rows // 4, 4, columns // 64, 16).permute(0, 2, 1, 3).reshape(rows // 4, columns)
    return torch.where(ordered > 2**15 - 1, ordered - 2**16, ordered).to(torch.int16).contiguous().view(torch.int32)


def padded(tensor: Tensor, fill: float = 0) -> Tensor:
    """Pad a matrix to multiples of 128 along its first axis."""
    missing = -len(tensor) % 128
    return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), fill)])


@dataclass
class SvdLayer:
    """An SVDQuant layer: y = R ((x + shift) / smooth) + up down x + bias.

    Attributes:
        rows: N.
        columns: K.
        is_float: NVFP4 instead of INT4.
        rank: of the branch.
        outer: scale of each row of NVFP4, (N,).
        is_fused: the smoothing is part of the layer before.
    """

    rows: int
    columns: int
    is_float: bool = False
    rank: int = 16
    outer: Tensor | None = None
    is_fused: bool = False
    codes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows, columns = self.rows, self.columns
        groups = columns // (FLOAT_GROUP if self.is_float else GROUP)
        self.codes = torch.randint(0, 16, (rows, columns)) if self.is_float else torch.randint(-8, 8, (rows, columns))
        scales = torch.rand(rows, groups) * 0.02 + 0.002
        self.scales = (scales * 20).to(torch.float8_e4m3fn) if self.is_float else scales.bfloat16()
        self.smooth = torch.ones(columns).bfloat16() if self.is_fused else (torch.rand(columns) + 0.5).bfloat16()
        self.down = (torch.randn(self.rank, columns) * 0.05).bfloat16()
        self.up = (torch.randn(rows, self.rank) * 0.05).bfloat16()
        self.bias = torch.randn(rows).bfloat16()

    def residual(self) -> Tensor:
        """R, (N, K)."""
        if self.is_float:
            values = MAGNITUDES[self.codes & 7] * torch.where(self.codes > 7, -1.0, 1.0)
            scales = self.scales.float().repeat_interleave(FLOAT_GROUP, 1)
            return values * scales * (1 if self.outer is None else self.outer.float()[:, None])
        return self.codes.float() * self.scales.float().repeat_interleave(GROUP, 1)

    def weight(self) -> Tensor:
        """The weight of the layer, (N, K)."""
        return self.residual() / self.smooth.float() + self.up.float() @ self.down.float()

    def full_bias(self, shift: float = 0.0) -> Tensor:
        """The bias with what the shift adds, (N,)."""
        return self.bias.float() + self.residual() @ (shift / self.smooth.float())

    def tensors(self, prefix: str, *, old: bool = False) -> dict[str, Tensor]:
        """The tensors of a file; `old` is the first generation of names."""
        down, up, smooth = ("lora_down", "lora_up", "smooth") if old else ("proj_down", "proj_up", "smooth_factor")
        wide = padded(padded(self.codes).T).T
        pack = pack_float8_scales if self.is_float else pack_scales
        groups = wide.shape[1] // (FLOAT_GROUP if self.is_float else GROUP)
        scales = self.scales.float()
        scales = torch.cat([scales, scales.new_ones(self.rows, groups - scales.shape[1])], 1)
        packed_smooth = pack_scales(padded(self.smooth[:, None], 1)).flatten()
        found = {
            "qweight": pack_codes(wide),
            "wscales": pack(padded(scales, 1).to(self.scales.dtype)),
            smooth: packed_smooth,
            f"{smooth}_orig": packed_smooth.clone(),
            down: pack_projection(padded(self.down.T).T, down=True),
            up: pack_projection(padded(self.up), down=False),
            "bias": pack_scales(padded(self.bias[:, None])).flatten(),
        }
        if self.outer is not None:
            found["wcscales"] = pack_scales(padded(self.outer.bfloat16()[:, None], 1)).flatten()
        return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in found.items()}


@dataclass
class AwqLayer:
    """A weight-only layer: weight = scale * code + zero, in the order of a file.

    Attributes:
        rows: N.
        columns: K.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        self.codes = torch.randint(0, 16, (self.rows, self.columns))
        self.scales = (torch.rand(self.rows, self.columns // GROUP) * 0.02 + 0.002).bfloat16()
        self.zeros = (-self.scales.float() * 7.3).bfloat16()
        self.bias = torch.randn(self.rows).bfloat16()

    def weight(self) -> Tensor:
        """The weight in the order of the file, (N, K)."""
        scales, zeros = (one.float().repeat_interleave(GROUP, 1) for one in (self.scales, self.zeros))
        return self.codes.float() * scales + zeros

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of a file."""
        found = {"qweight": pack_awq(self.codes), "wscales": self.scales.T, "wzeros": self.zeros.T, "bias": self.bias}
        return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in found.items()}
