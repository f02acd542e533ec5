"""A slow multi-scale quantiser on weights in the official layout, and the recipe of the golden numbers.

Nothing here imports our networks: nearest entries, area means and cubic kernels are written out, in double precision.

The golden file `golden_multi_scale_vq.json` was made by running the official code (FoundationVision/VAR, models/,
float32 on a CPU) with the weights that `fill` makes and the images of `pictures`. Entries:

    indices        the tokens of both images, scale by scale
    latent         f_hat of both images: 16 values spread over it
    teacher        the teacher-forcing inputs: 16 values
    decoded        the decoded f_hat, clamped: 16 values
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

SCALES = (1, 2, 3, 4)
CHANNELS, VOCAB = 8, 24
CONFIG = {
    "scales": SCALES,
    "latent_channels": CHANNELS,
    "vocab_size": VOCAB,
    "block_out_channels": (32, 32, 64, 64, 64),
}
PHIS = (0, 1, 2, 3)  # which convolution serves which of the four scales

GOLDEN: dict[str, list] = json.loads((Path(__file__).parent / "golden_multi_scale_vq.json").read_text())


def spread(shape: tuple[int, ...], salt: int) -> Tensor:
    """Noise-like numbers of mean 0 and variance 1: the fractional parts of multiples of squares (Weyl)."""
    index = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    fraction = (index * index * 0.7548776662466927 + salt * 0.5698402909980532) % 1.0
    return ((fraction - 0.5) * math.sqrt(12)).reshape(shape).float()


def sampled(values: Tensor) -> list[float]:
    """16 values spread evenly over a tensor."""
    flat = values.flatten()
    return flat[torch.linspace(0, len(flat) - 1, 16).long()].tolist()


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights of the given official names and shapes: arithmetic, so that every version makes the same ones."""
    state = {}
    for salt, key in enumerate(sorted(shapes)):
        noise = spread(shapes[key], salt)
        if "norm" in key and key.endswith("weight"):
            state[key] = 1 + 0.2 * noise
        elif key == "quantize.embedding.weight":
            state[key] = noise
        elif key == "quantize.ema_vocab_hit_SV":
            state[key] = noise.abs()
        elif len(shapes[key]) == 1:
            state[key] = 0.1 * noise
        else:
            state[key] = 1.5 * noise / math.sqrt(math.prod(shapes[key][1:]))
    return state


def pictures() -> Tensor:
    """Two images, (2, 3, 64, 64), in [-1, 1]."""
    side = SCALES[-1] * 16
    return spread((2, 3, side, side), salt=5).clamp(-1, 1)


def area_matrix(size: int, target: int) -> Tensor:
    """Means over the cells that each of `target` bins touches, (target, size)."""
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for i in range(target):
        first, last = i * size // target, -((-(i + 1) * size) // target)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def cubic_matrix(size: int, target: int) -> Tensor:
    """Cubic convolution (Keys, A = -0.75) with repeated borders, (target, size)."""
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for i in range(target):
        place = (i + 0.5) * size / target - 0.5
        start = math.floor(place)
        for j in range(start - 1, start + 3):
            d, a = abs(place - j), -0.75
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            weight = near if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), size - 1)] += weight
    return matrix


def resize(x: Tensor, matrix: Tensor) -> Tensor:
    """Apply a resizing matrix to both axes of (C, H, W)."""
    return matrix @ x @ matrix.T


def phi(state: dict[str, Tensor], scale: int, x: Tensor) -> Tensor:
    """Half the map, half its 3x3 convolution, neighbour by neighbour; (C, H, W)."""
    key = f"quantize.quant_resi.qresi_ls.{PHIS[scale]}"
    weight, bias = state[f"{key}.weight"].double(), state[f"{key}.bias"].double()
    rows, columns = x.shape[-2:]
    padded = torch.zeros(len(x), rows + 2, columns + 2, dtype=torch.float64)
    padded[:, 1:-1, 1:-1] = x
    out = bias[:, None, None].expand(-1, rows, columns).clone()
    for dy in range(3):
        for dx in range(3):
            shifted = padded[:, dy : dy + rows, dx : dx + columns]
            out += torch.einsum("oc,chw->ohw", weight[:, :, dy, dx], shifted)
    return 0.5 * x + 0.5 * out


def quantize(state: dict[str, Tensor], features: Tensor) -> tuple[list[list[int]], Tensor, Tensor]:
    """Tokens, latent and teacher-forcing inputs of the features (C, H, W) of one image."""
    codebook = state["quantize.embedding.weight"].double()
    rest, full = features.double(), SCALES[-1]
    latent, tokens, inputs = torch.zeros_like(rest), [], []
    for scale, side in enumerate(SCALES):
        small = rest if side == full else resize(rest, area_matrix(full, side))
        vectors = small.flatten(1).T
        found = [min(range(VOCAB), key=lambda v, z=z: ((z - codebook[v]) ** 2).sum().item()) for z in vectors]
        embedded = codebook[found].T.reshape(-1, side, side)
        added = phi(state, scale, embedded if side == full else resize(embedded, cubic_matrix(side, full)))
        latent, rest = latent + added, rest - added
        tokens.append(found)
        if scale + 1 < len(SCALES):
            inputs.append(resize(latent, area_matrix(full, SCALES[scale + 1])).flatten(1).T)
    return tokens, latent, torch.cat(inputs)
