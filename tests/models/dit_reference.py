"""A slow, straight-line DiT and SiT on weights in the official layout, and the recipe of the golden numbers.

Nothing here imports our networks: positions, attention and patches are written out element by element, so that a
mistake in our layers cannot hide in the reference.

The golden file `golden_dit.json` was made by running the official code (facebookresearch/DiT, models.py and
diffusion/; willisma/SiT, models.py and transport/; float32 on a CPU) with the weights of `official_state`, the
inputs of `inputs` and the noise of `noise`. They are arithmetic, not random numbers, so that every version of
every library makes the same ones. Entries:

    dit/<size>/<t>, sit/<size>/<t>   the model's output at that latent size and time: 16 values spread over it
    dit/cfg, sit/cfg                 forward_with_cfg, scale 4, the guided half
    dit/ddpm                         p_sample_loop, 10 respaced steps of 1000, scale 4: the guided half
    sit/ode, sit/sde                 Euler with 10 steps; Euler-Maruyama with 10 calls ("sigma", "Mean", 0.04)
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

WIDTH, DEPTH, HEADS, PATCH, CHANNELS, CLASSES = 48, 3, 4, 2, 4, 10
LABELS = [1, 7]
GUIDANCE = 4.0
STEPS = 10
SIZES = (4, 8)
TIMES = {"dit": (3.0, 750.0), "sit": (0.125, 0.75)}

GOLDEN: dict[str, list[float]] = json.loads((Path(__file__).parent / "golden_dit.json").read_text())


def spread(shape: tuple[int, ...], salt: int) -> Tensor:
    """Noise-like numbers of mean 0 and variance 1: the fractional parts of multiples of squares (Weyl)."""
    index = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    fraction = (index * index * 0.7548776662466927 + salt * 0.5698402909980532) % 1.0
    return ((fraction - 0.5) * math.sqrt(12)).reshape(shape).float()


def official_state(size: int) -> dict[str, Tensor]:
    """Weights of the small test model in the official layout, for a latent of `size` pixels a side."""
    shapes = {
        "x_embedder.proj": (WIDTH, CHANNELS, PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (PATCH * PATCH * 2 * CHANNELS, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
            f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }
    state = {"y_embedder.embedding_table.weight": spread((CLASSES + 1, WIDTH), salt=0)}
    for salt, (name, shape) in enumerate(shapes.items(), start=1):
        state[f"{name}.weight"] = spread(shape, salt) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = 0.2 * spread(shape[:1], salt + 100)
    return {**state, "pos_embed": positions(size // PATCH).float()[None]}


def inputs(size: int) -> Tensor:
    """The noisy latents (2, C, size, size)."""
    return spread((len(LABELS), CHANNELS, size, size), salt=1000)


def noise(step: int, size: int) -> Tensor:
    """The noise of a stochastic step, for the guided half of the batch."""
    return spread((len(LABELS), CHANNELS, size, size), salt=2000 + step)


def sampled(output: Tensor) -> list[float]:
    """Sixteen values spread evenly over a tensor, which the golden file keeps."""
    flat = output.flatten()
    return flat[:: len(flat) // 16][:16].tolist()


def positions(side: int) -> Tensor:
    """The position table (side * side, WIDTH), one number at a time."""
    quarter = WIDTH // 4
    table = torch.zeros(side * side, WIDTH, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                omega = 1.0 / 10_000 ** (i / quarter)
                values = (column * omega, row * omega)  # the column comes first
                for half, angle in enumerate(values):
                    table[row * side + column, half * 2 * quarter + i] = math.sin(angle)
                    table[row * side + column, half * 2 * quarter + quarter + i] = math.cos(angle)
    return table


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """`x W^T + b` in float64."""
    return x @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def normalized(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def attend(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Attention of one image's tokens (N, D), head by head."""
    q, k, v = linear(state, f"{name}.qkv", x).split(WIDTH, dim=1)
    width = WIDTH // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        scores = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(width))
        heads.append(scores / scores.sum(-1, keepdim=True) @ v[:, part])
    return linear(state, f"{name}.proj", torch.cat(heads, dim=1))


def reference(state: dict[str, Tensor], latent: Tensor, time: float, label: int, family: str) -> Tensor:
    """One image's output in float64; `latent` is (C, H, W), any size that patches fit."""
    rows, columns = latent.shape[1] // PATCH, latent.shape[2] // PATCH
    side = max(rows, columns)
    table = positions(side).reshape(side, side, WIDTH)
    kernel = state["x_embedder.proj.weight"].double().flatten(1)
    tokens = []
    for row in range(rows):
        for column in range(columns):
            patch = latent[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            embedded = kernel @ patch.double().flatten() + state["x_embedder.proj.bias"].double()
            tokens.append(embedded + table[row, column])
    x = torch.stack(tokens)

    angles = [time * math.exp(-math.log(10_000) * i / 128) for i in range(128)]
    waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    c = linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", waves)))
    c = silu(c + state["y_embedder.embedding_table.weight"].double()[label])

    for i in range(DEPTH):
        name = f"blocks.{i}"
        vectors = linear(state, f"{name}.adaLN_modulation.1", c).split(WIDTH)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        x = x + gate_a * attend(state, f"{name}.attn", normalized(x) * (1 + scale_a) + shift_a)
        hidden = linear(state, f"{name}.mlp.fc1", normalized(x) * (1 + scale_m) + shift_m)
        x = x + gate_m * linear(state, f"{name}.mlp.fc2", gelu(hidden))

    shift, scale = linear(state, "final_layer.adaLN_modulation.1", c).split(WIDTH)
    x = linear(state, "final_layer.linear", normalized(x) * (1 + scale) + shift)
    out = torch.zeros(2 * CHANNELS, rows * PATCH, columns * PATCH, dtype=torch.float64)
    for n, token in enumerate(x):
        row, column = divmod(n, columns)
        patch = token.reshape(PATCH, PATCH, 2 * CHANNELS).permute(2, 0, 1)
        out[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = patch
    return out[:CHANNELS] if family == "sit" else out
