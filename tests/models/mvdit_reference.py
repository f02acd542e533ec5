"""A slow, straight-line MVDiT on weights in the official layout, and the recipe of the golden numbers.

Nothing here imports our networks; arithmetic that other references have too comes from there.

The golden file `golden_mvdit.json` was made by running the official code (NJU-PCALab/OpenVid-1M,
openvid/models/mvdit/mvdit.py, commit 215fa7d; float32 on a CPU, xformers' attention replaced by the same products) with
the weights of `official_state` and the inputs of `clip`, `text` and `MASK`. Each entry
`<frames>x<height>x<width>/<time>` holds 16 values spread over the output.
"""

import json
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests.models.dit_reference import (
    CHANNELS,
    HEADS,
    PATCH,
    WIDTH,
    attend,
    gelu,
    linear,
    normalized,
    positions,
    silu,
    spread,
)
from tests.models.space_time_reference import frame_positions

DEPTH, TEXT_DIM, LENGTH = 2, 20, 5
SIZES = ((1, 8, 8), (4, 8, 12), (16, 4, 4))
TIMES = (3.0, 750.0)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

GOLDEN: dict[str, list[float]] = json.loads((Path(__file__).parent / "golden_mvdit.json").read_text())


@cache
def official_state(frames: int, side: int) -> dict[str, Tensor]:
    """Weights of the small test model in the official layout; not to be changed in place."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj": (WIDTH, CHANNELS, 1, PATCH, PATCH),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "t_block.1": (6 * WIDTH, WIDTH),
        "t_block_y.1": (6 * WIDTH, WIDTH),
        "t_block_temp.1": (3 * WIDTH, WIDTH),
        "t_block_y_temp.1": (3 * WIDTH, WIDTH),
        "y_embedder.y_proj.fc1": (WIDTH, TEXT_DIM),
        "y_embedder.y_proj.fc2": (WIDTH, WIDTH),
        "final_layer.linear": (PATCH * PATCH * 2 * CHANNELS, WIDTH),
    }
    tables = {"final_layer.scale_shift_table": 2}
    for i in range(DEPTH):
        block = f"blocks.{i}"
        for attention in ("attn", "attn_temp"):
            shapes |= {f"{block}.{attention}.qkv": (3 * WIDTH, WIDTH), f"{block}.{attention}.proj": (WIDTH, WIDTH)}
        cross = {"q_linear": WIDTH, "kv_linear": 2 * WIDTH, "proj": WIDTH}
        shapes |= {f"{block}.cross_attn.{name}": (rows, WIDTH) for name, rows in cross.items()}
        for mlp in ("mlp", "mlp_y"):
            shapes |= {f"{block}.{mlp}.fc1": (4 * WIDTH, WIDTH), f"{block}.{mlp}.fc2": (WIDTH, 4 * WIDTH)}
        for ending, rows in (("", 6), ("_y", 6), ("_temp", 3), ("_y_temp", 3)):
            tables[f"{block}.scale_shift_table{ending}"] = rows
    state = {"y_embedder.y_embedding": spread((LENGTH, TEXT_DIM), salt=0)}
    for salt, (name, shape) in enumerate(shapes.items(), start=1):
        state[f"{name}.weight"] = spread(shape, salt) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = 0.2 * spread(shape[:1], salt + 100)
    for salt, (name, rows) in enumerate(tables.items(), start=200):
        state[name] = 0.5 * spread((rows, WIDTH), salt)
    places, times = positions(side // PATCH).float()[None], frame_positions(frames).float()[None]
    return {**state, "pos_embed": places, "pos_embed_temporal": times}


def clip(frames: int, height: int, width: int) -> Tensor:
    """The noisy latents, (2, C, T, H, W)."""
    return spread((2, CHANNELS, frames, height, width), salt=1000)


def text() -> Tensor:
    """Text states, (2, L, Dt)."""
    return spread((2, LENGTH, TEXT_DIM), salt=1001)


def cross(state: dict[str, Tensor], name: str, x: Tensor, words: Tensor) -> Tensor:
    """Attention of tokens (S, D) to words (L, D), head by head."""
    q = linear(state, f"{name}.q_linear", x)
    k, v = linear(state, f"{name}.kv_linear", words).split(WIDTH, dim=1)
    width = WIDTH // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        scores = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(width))
        heads.append(scores / scores.sum(-1, keepdim=True) @ v[:, part])
    return linear(state, f"{name}.proj", torch.cat(heads, dim=1))


def block(
    state: dict[str, Tensor], name: str, x: Tensor, y: Tensor, c: Tensor, in_time: Tensor | float
) -> tuple[Tensor, Tensor]:
    """One block on a clip (T, S, D) and its text (T, L, D), without padding."""
    vectors = {}
    for ending, rows in (("", 6), ("_y", 6), ("_temp", 3), ("_y_temp", 3)):
        shared = linear(state, f"t_block{ending}.1", c).reshape(rows, WIDTH)
        vectors[ending] = state[f"{name}.scale_shift_table{ending}"].double() + shared
    places = x.shape[1]

    shift, scale, gate, shift_m, scale_m, gate_m = vectors[""]
    shift_y, scale_y, gate_y, shift_n, scale_n, gate_n = vectors["_y"]
    joint = torch.cat([normalized(x) * (1 + scale) + shift, normalized(y) * (1 + scale_y) + shift_y], dim=1)
    joint = torch.stack([attend(state, f"{name}.attn", frame) for frame in joint])
    x, y = x + gate * joint[:, :places], y + gate_y * joint[:, places:]

    (shift, scale, gate), (shift_y, scale_y, gate_y) = vectors["_temp"], vectors["_y_temp"]
    joint = torch.cat([normalized(x) * (1 + scale) + shift, normalized(y) * (1 + scale_y) + shift_y], dim=1) + in_time
    joint = torch.stack([attend(state, f"{name}.attn_temp", joint[:, i]) for i in range(joint.shape[1])], dim=1)
    x, y = x + gate * joint[:, :places], y + gate_y * joint[:, places:]

    x = x + torch.stack([cross(state, f"{name}.cross_attn", frame, words) for frame, words in zip(x, y, strict=True)])
    hidden = gelu(linear(state, f"{name}.mlp.fc1", normalized(x) * (1 + scale_m) + shift_m))
    hidden_y = gelu(linear(state, f"{name}.mlp_y.fc1", normalized(y) * (1 + scale_n) + shift_n))
    x = x + gate_m * linear(state, f"{name}.mlp.fc2", hidden)
    return x, y + gate_n * linear(state, f"{name}.mlp_y.fc2", hidden_y)


def reference(state: dict[str, Tensor], latent: Tensor, time: float, sample: int) -> Tensor:
    """One clip's output in float64; `latent` is (C, T, H, W), any size that patches fit."""
    _, frames, height, width = latent.shape
    rows, columns = height // PATCH, width // PATCH
    side = max(rows, columns)
    table = positions(side).reshape(side, side, WIDTH)[:rows, :columns].reshape(-1, WIDTH)
    kernel, bias = (state[f"x_embedder.proj.{part}"].double() for part in ("weight", "bias"))
    x = torch.zeros(frames, rows * columns, WIDTH, dtype=torch.float64)
    for t in range(frames):
        for place in range(rows * columns):
            i, j = (PATCH * index for index in divmod(place, columns))
            patch = latent[:, t, i : i + PATCH, j : j + PATCH].double()
            x[t, place] = (kernel[:, :, 0] * patch).sum(dim=(1, 2, 3)) + bias + table[place]
    angles = time * 10_000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    waves = torch.cat([angles.cos(), angles.sin()])
    c = linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", waves)))
    words = text()[sample][MASK[sample].bool()].double()
    words = linear(state, "y_embedder.y_proj.fc2", gelu(linear(state, "y_embedder.y_proj.fc1", words)))
    y = words.expand(frames, -1, -1)

    for i in range(DEPTH):
        in_time = frame_positions(frames)[:, None] if i == 0 else 0.0
        x, y = block(state, f"blocks.{i}", x, y, silu(c), in_time)

    shift, scale = state["final_layer.scale_shift_table"].double() + c
    x = linear(state, "final_layer.linear", normalized(x) * (1 + scale) + shift)
    out = torch.zeros(2 * CHANNELS, frames, height, width, dtype=torch.float64)
    for t in range(frames):
        for place in range(rows * columns):
            i, j = (PATCH * index for index in divmod(place, columns))
            out[:, t, i : i + PATCH, j : j + PATCH] = x[t, place].reshape(PATCH, PATCH, -1).permute(2, 0, 1)
    return out
