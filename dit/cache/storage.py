"""How tokens of a cache are stored: as they are, or in 8 bits.

In 8 bits, keys lose the mean that the tokens of their scale and head share and have one step a token; values have one
step a channel for the tokens of a scale and head. What is stored once is never rounded again: each scale brings a
segment with its own means and steps, and each token remembers its segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from dit.quant.reference import round_up_to_bfloat16

KV_DTYPES = ("auto", "int8")
"""How keys and values can be stored; "auto" is the dtype of the model."""

MOST = 127
"""Largest code."""
STEP_DTYPE = torch.bfloat16
"""Of steps and means: the range of float32 in two bytes; steps are rounded up, so that no code is cut off."""


class StoredTokens(Protocol):
    """Keys and values that a layer holds."""

    @property
    def length(self) -> int:
        """Tokens of a head."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        ...

    def gathered(self, index: Tensor) -> Self:
        """Return some tokens of each row and head, by indices (B, K, c)."""
        ...

    def selected(self, rows: Tensor) -> Self:
        """Return rows of the batch, by indices (B',)."""
        ...

    def write_into(self, keys: Tensor, values: Tensor) -> None:
        """Write the tokens, (B, K, T, E) each."""
        ...


@dataclass(frozen=True)
class ExactTokens:
    """Tokens as they are.

    Attributes:
        keys: (B, K, T, E).
        values: (B, K, T, E).
    """

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """Tokens of a head."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def cloned(self) -> ExactTokens:
        """Return a copy."""
        return ExactTokens(self.keys.clone(), self.values.clone())

    def gathered(self, index: Tensor) -> ExactTokens:
        """Return some tokens of each row and head, by indices (B, K, c)."""
        return ExactTokens(_gather(self.keys, index), _gather(self.values, index))

    def selected(self, rows: Tensor) -> ExactTokens:
        """Return rows of the batch, by indices (B',)."""
        return ExactTokens(self.keys.index_select(0, rows), self.values.index_select(0, rows))

    def write_into(self, keys: Tensor, values: Tensor) -> None:
        """Write the tokens, (B, K, T, E) each."""
        keys.copy_(self.keys)
        values.copy_(self.values)


@dataclass(frozen=True)
class Int8Tokens:
    """Tokens in 8 bits: key = code * step of the token + mean of its segment, value = code * step of the channel.

    Attributes:
        keys: codes, int8, (B, K, T, E).
        values: codes, int8, (B, K, T, E).
        segments: which segment each token belongs to, uint8, (B, K, T).
        key_steps: (B, K, T, 1).
        key_means: of each segment, (B, K, S, E).
        value_steps: of each segment, (B, K, S, E).
    """

    keys: Tensor
    values: Tensor
    segments: Tensor
    key_steps: Tensor
    key_means: Tensor
    value_steps: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Int8Tokens:
        """Quantize the tokens of one scale, (B, K, T, E) each."""
        keys, values = keys.float(), values.float()
        means = keys.mean(2, keepdim=True).to(STEP_DTYPE)  # (B, K, 1, E)
        keys = keys - means.float()
        key_steps = round_up_to_bfloat16(keys.abs().amax(-1, keepdim=True) / MOST)  # (B, K, T, 1)
        value_steps = round_up_to_bfloat16(values.abs().amax(2, keepdim=True) / MOST)  # (B, K, 1, E)
        return cls(
            (keys / key_steps).round().to(torch.int8),
            (values / value_steps).round().to(torch.int8),
            torch.zeros(keys.shape[:3], dtype=torch.uint8, device=keys.device),
            key_steps.to(STEP_DTYPE),
            means,
            value_steps.to(STEP_DTYPE),
        )

    @property
    def length(self) -> int:
        """Tokens of a head."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, steps, means and segments."""
        return sum(one.nbytes for one in vars(self).values())

    def joined(self, new: Int8Tokens) -> Int8Tokens:
        """Return these tokens and those of a further scale behind them."""
        later = new.segments + self.key_means.shape[2]
        return Int8Tokens(
            torch.cat([self.keys, new.keys], dim=2),
            torch.cat([self.values, new.values], dim=2),
            torch.cat([self.segments, later], dim=2),
            torch.cat([self.key_steps, new.key_steps], dim=2),
            torch.cat([self.key_means, new.key_means], dim=2),
            torch.cat([self.value_steps, new.value_steps], dim=2),
        )

    def gathered(self, index: Tensor) -> Int8Tokens:
        """Return some tokens of each row and head, by indices (B, K, c); segments stay, even empty ones."""
        return Int8Tokens(
            _gather(self.keys, index),
            _gather(self.values, index),
            self.segments.gather(2, index),
            _gather(self.key_steps, index),
            self.key_means,
            self.value_steps,
        )

    def selected(self, rows: Tensor) -> Int8Tokens:
        """Return rows of the batch, by indices (B',)."""
        return Int8Tokens(*(one.index_select(0, rows) for one in vars(self).values()))

    def write_into(self, keys: Tensor, values: Tensor) -> None:
        """Write the tokens, (B, K, T, E) each."""
        batch, heads, segments, width = self.key_means.shape
        first = torch.arange(0, batch * heads * segments, segments, device=keys.device).view(batch, heads, 1)
        rows = self.segments.long() + first  # (B, K, T), of a table of all segments
        means = self.key_means.reshape(-1, width)[rows].float()  # (B, K, T, E)
        keys.copy_(torch.addcmul(means, self.keys.float(), self.key_steps.float()))
        values.copy_(self.value_steps.reshape(-1, width)[rows].float().mul_(self.values))


def check_kv_dtype(kv_dtype: str) -> None:
    """Raise ValueError unless a storage format is known."""
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype {kv_dtype!r} is not known; use one of {', '.join(map(repr, KV_DTYPES))}")


def token_nbytes(head_dim: int, dtype: torch.dtype, kv_dtype: str) -> int:
    """Return bytes of one stored token of one head, key and value."""
    if kv_dtype == "auto":
        return 2 * head_dim * dtype.itemsize
    return 2 * head_dim + STEP_DTYPE.itemsize + torch.uint8.itemsize


def segment_nbytes(head_dim: int, kv_dtype: str) -> int:
    """Return bytes that a scale takes in one head beside its tokens."""
    return 0 if kv_dtype == "auto" else 2 * head_dim * STEP_DTYPE.itemsize


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return tokens (B, K, T, E) by indices (B, K, c)."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
