"""Hadamard rotation of a layer's inputs, in blocks of neighbouring channels (QuaRot, arXiv 2404.00456).

For orthogonal R, x W^T = (x R) (W R)^T. A Hadamard matrix spreads an outlier channel evenly over its block, so that one
scale suits all channels of it; signs drawn at random for the channels keep inputs that are alike from adding up. As the
matrix is symmetric, weights and inputs are rotated by the same function.

Inputs are rotated at run time: one element-wise product with `factors`, which joins balance and signs, and one matrix
product in the dtype of the input.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

SMALLEST_BLOCK = 8
"""Smaller blocks even out too little; layers that allow no larger one are not rotated."""
SIGN_SEED = 2_404_00456
"""Of the signs: layers of one width have the same, so that those that read one input can rotate it once."""


def hadamard(size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return Sylvester's Hadamard matrix, scaled to be orthonormal; it is symmetric.

    The matrix is kept and shared by all callers: don't change it.

    Args:
        size: n, a power of two.
        device: of the matrix.
        dtype: of the matrix.

    Returns:
        (n, n).

    Raises:
        ValueError: the size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"the size of a Hadamard matrix is {size}; use a power of two")
    where = torch.device("cpu" if device is None else device)
    if torch.compiler.is_compiling():
        return _make(size, where, dtype)
    return _kept(size, where, dtype)


def resolve_block(columns: int, asked: int) -> int:
    """Return the block size that a layer of some width is rotated in.

    Args:
        columns: inputs K of the layer.
        asked: largest size; 0 asks for no rotation.

    Returns:
        The largest power of two that divides K and is at most `asked`; 0 where that is below `SMALLEST_BLOCK`.
    """
    if asked < SMALLEST_BLOCK or columns < 1:
        return 0
    block = math.gcd(columns, 2 ** (asked.bit_length() - 1))
    return block if block >= SMALLEST_BLOCK else 0


def rotation_sign(columns: int) -> Tensor:
    """Draw the signs of a layer's inputs; always the same ones for one width.

    Args:
        columns: inputs K of the layer.

    Returns:
        int8, (K,), of -1 and 1, on the CPU.
    """
    generator = torch.Generator().manual_seed(SIGN_SEED + columns)
    return torch.randint(0, 2, (columns,), generator=generator, dtype=torch.int8) * 2 - 1


def input_factors(balance: Tensor | None, sign: Tensor | None) -> Tensor | None:
    """Join what inputs are multiplied by, channel by channel, before the matrix product.

    Args:
        balance: `input_balance` of a layer, (K,), or None.
        sign: `rotation_sign` of a layer, (K,), or None.

    Returns:
        float32, (K,); None if both are None.
    """
    if balance is None:
        return None if sign is None else sign.float()
    return balance.float() if sign is None else balance.float() * sign


def prepare(x: Tensor, factors: Tensor | None, block: int) -> Tensor:
    """Balance and rotate inputs, as a quantized layer does before it quantizes them.

    Args:
        x: (..., K), of any float dtype.
        factors: of `input_factors`, (K,), or None.
        block: size of the blocks, which divides K; 0 is no rotation.

    Returns:
        (..., K), in the dtype of `x`.
    """
    if factors is not None:
        x = x * factors.to(x.dtype)  # (..., K)
    return _rotate_blocks(x, block)


def rotate(x: Tensor, sign: Tensor | None, block: int) -> Tensor:
    """Rotate inputs (..., K), or weights (N, K), in blocks of channels.

    Args:
        x: (..., K), of any float dtype.
        sign: (K,), of -1 and 1; None for none.
        block: size of the blocks, which divides K; 0 leaves `x` alone, signs included.

    Returns:
        (..., K).

    Raises:
        ValueError: the block does not divide K.
    """
    return x if block == 0 else prepare(x, None if sign is None else sign.to(x.dtype), block)


def unrotate(x: Tensor, sign: Tensor | None, block: int) -> Tensor:
    """Undo `rotate`.

    Args:
        x: (..., K), rotated.
        sign: as it was rotated with.
        block: as it was rotated with.

    Returns:
        (..., K).
    """
    if block == 0:
        return x
    x = _rotate_blocks(x, block)  # the matrix is its own inverse
    return x if sign is None else x * sign.to(x.dtype)


def rotate_weight(weight: Tensor, sign: Tensor | None, block: int) -> Tensor:
    """Rotate a weight in float32, so that rotated inputs give the outputs that plain ones gave.

    Args:
        weight: (N, K), balanced before that if it is to be balanced.
        sign: (K,), of the inputs.
        block: of the inputs.

    Returns:
        float32, (N, K).
    """
    return rotate(weight.float(), sign, block)


def rotate_gram(gram: Tensor, sign: Tensor | None, block: int) -> Tensor:
    """Rotate the Gram matrix X^T X of inputs to that of rotated inputs.

    Args:
        gram: (K, K).
        sign: (K,), of the inputs.
        block: of the inputs.

    Returns:
        (K, K).
    """
    return rotate(rotate(gram, sign, block).mT, sign, block)


def rotate_slowly(x: Tensor, sign: Tensor | None, block: int) -> Tensor:
    """Rotate as `rotate` does, from the definition: the reference.

    H[i, j] is 1 / sqrt(n), negative where the bits that i and j have in common are odd in number.
    """
    if block == 0:
        return x
    signed = x.double() if sign is None else x.double() * sign.double()
    rotated = torch.zeros_like(signed)
    for column in range(x.shape[-1]):
        first, j = column - column % block, column % block
        for i in range(block):
            entry = (-1) ** (i & j).bit_count() / math.sqrt(block)
            rotated[..., column] += signed[..., first + i] * entry
    return rotated.to(x.dtype)


def _rotate_blocks(x: Tensor, block: int) -> Tensor:
    if block == 0:
        return x
    if x.shape[-1] % block:
        raise ValueError(f"a block of {block} channels does not divide {x.shape[-1]}; see resolve_block")
    matrix = hadamard(block, x.device, x.dtype)  # (n, n)
    return (x.reshape(-1, block) @ matrix).view(x.shape)  # (..., K)


@lru_cache(maxsize=32)
def _kept(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # a tensor of inference mode could not be trained through
        return _make(size, device, dtype)


def _make(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(device, dtype)  # (n, n)
