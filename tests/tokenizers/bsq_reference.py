"""A slow multi-scale bit quantiser, and the recipe of the golden numbers.

Nothing here imports our networks: area means and linear kernels are written out, in double precision.

The golden file `golden_multi_scale_bsq.json` was made by running the official code (FoundationVision/Infinity,
infinity/models/bsq_vae/, base_ch 32, float32 on a CPU) with the weights of `fill` and the images of `picture`.
Entries, for each case:

    <case>/bits      the bits of each scale, one string an image, token by token
    <case>/latent    the sum of the codes, as the sampler sums it: 16 values
    <case>/inputs    the generator's inputs from the second scale on, as the sampler makes them: 16 values
    <case>/decoded   the decoded latent of the encoder, clamped: 16 values
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tokenizers.multi_scale_reference import area_matrix, sampled, spread

CASES: dict[str, dict[str, Any]] = {
    "square": {"bits": 6, "mult": (1, 1, 2), "patchify": 1, "grids": ((1, 1), (2, 2), (3, 3), (4, 4))},
    "wide": {"bits": 8, "mult": (1, 2), "patchify": 1, "grids": ((1, 1), (1, 2), (3, 6), (4, 8))},
    "patchify": {"bits": 4, "mult": (1, 2), "patchify": 2, "grids": ((1, 1), (2, 2), (4, 3))},
}

GOLDEN: dict[str, list] = json.loads((Path(__file__).parent / "golden_multi_scale_bsq.json").read_text())


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of the given official names and shapes: arithmetic, so that every version makes the same ones."""
    state = {}
    for salt, key in enumerate(sorted(shapes)):
        noise = spread(shapes[key], salt)
        if key.endswith("mask"):
            state[key] = 2 ** torch.arange(shapes[key][0] - 1, -1, -1)
        elif key.endswith("norm.weight"):
            state[key] = 1 + 0.2 * noise
        elif len(shapes[key]) == 1:
            state[key] = 0.1 * noise
        else:
            state[key] = 1.5 * noise / math.sqrt(math.prod(shapes[key][1:]))
    return state


def picture(name: str) -> Tensor:
    """Two images of a case's size, (2, 3, H, W), in [-1, 1]."""
    case = CASES[name]
    pixels = case["patchify"] * 2 ** (len(case["mult"]) - 1)
    rows, columns = case["grids"][-1]
    return spread((2, 3, rows * pixels, columns * pixels), salt=5).clamp(-1, 1)


def linear_matrix(size: int, target: int) -> Tensor:
    """Linear interpolation between the centres of cells, with repeated borders, (target, size)."""
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for i in range(target):
        place = max((i + 0.5) * size / target - 0.5, 0.0)
        low = int(place)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (place - low)
        matrix[i, high] += place - low
    return matrix


def to_tokens(x: Tensor, p: int) -> Tensor:
    """Tokens (N, d p p) of a map (d, h p, w p), cell by cell."""
    rows = []
    for i in range(0, x.shape[1], p):
        for j in range(0, x.shape[2], p):
            rows.append(x[:, i : i + p, j : j + p].reshape(-1))
    return torch.stack(rows)


def quantize(features: Tensor, grids: tuple, p: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Bits of each scale (N, d p p), their sum (d, H, W), and the generator's inputs, for features (d, H, W)."""
    rest = features.double()
    latent, tokens, inputs = torch.zeros_like(rest), [], []
    height, width = features.shape[1:]
    for scale, (rows, columns) in enumerate(grids):
        h, w = rows * p, columns * p
        small = area_matrix(height, h) @ rest @ area_matrix(width, w).T
        bits = (small > 0).long()
        codes = (2.0 * bits - 1) / math.sqrt(len(features))
        added = linear_matrix(h, height) @ codes.double() @ linear_matrix(w, width).T
        latent, rest = latent + added, rest - added
        tokens.append(to_tokens(bits, p))
        if scale + 1 < len(grids):
            h, w = (side * p for side in grids[scale + 1])
            inputs.append(to_tokens(linear_matrix(height, h) @ latent @ linear_matrix(width, w).T, p))
    return tokens, latent, torch.cat(inputs)


__all__ = ["CASES", "GOLDEN", "fill", "picture", "quantize", "sampled", "spread"]
