"""A slow, straight-line VDT and Latte on weights in the official layouts, and the recipe of the golden numbers.

Nothing here imports our networks; arithmetic that DiT's reference has too comes from there.

The golden file `golden_space_time.json` was made by running the official code (RERV/VDT, models.py, commit cdbad2b;
Vchitect/Latte, models/latte.py, commit b27c24a; float32 on a CPU) with the weights of `official_state` and the inputs
of `clip`, `LABELS` and `text`. Each entry `<kind>/<frames>/<time>` holds 16 values spread over the output in our order
of axes, (B, C, T, H, W).
"""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests.models.dit_reference import (
    CHANNELS,
    CLASSES,
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

DEPTH = 4
SIZE = 8
LABELS = [1, 7]
TEXT = (77, 768)
TIMES = (3.0, 750.0)
FRAMES = (1, 4, 16)
KINDS = ("vdt", "latte", "latte_class", "latte_text")
"""VDT; Latte without condition, with labels, and with text."""

GOLDEN: dict[str, list[float]] = json.loads((Path(__file__).parent / "golden_space_time.json").read_text())


@cache
def official_state(kind: str, frames: int, size: int = SIZE) -> dict[str, Tensor]:
    """Weights of the small test model in the official layout; not to be changed in place."""
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
        if kind == "vdt":
            shapes |= {
                f"blocks.{i}.temporal_norm1": (WIDTH,),
                f"blocks.{i}.temporal_attn.qkv": (3 * WIDTH, WIDTH),
                f"blocks.{i}.temporal_attn.proj": (WIDTH, WIDTH),
                f"blocks.{i}.temporal_fc": (WIDTH, WIDTH),
            }
    if kind == "latte_text":
        shapes["text_embedding_projection.1"] = (WIDTH, TEXT[0] * TEXT[1])
    state = {}
    for salt, (name, shape) in enumerate(shapes.items(), start=1):
        fan_in = torch.Size(shape[1:]).numel()
        state[f"{name}.weight"] = spread(shape, salt) / fan_in**0.5 if len(shape) > 1 else 1 + 0.2 * spread(shape, salt)
        state[f"{name}.bias"] = 0.2 * spread(shape[:1], salt + 100)
    if kind in ("vdt", "latte_class"):
        state["y_embedder.embedding_table.weight"] = spread((CLASSES + 1, WIDTH), salt=0)
    table = "time_embed" if kind == "vdt" else "temp_embed"
    return {**state, "pos_embed": positions(size // PATCH).float()[None], table: frame_positions(frames).float()[None]}


def clip(frames: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """The noisy latents in our order of axes, (2, C, T, H, W)."""
    return spread((2, CHANNELS, frames, height, width), salt=1000)


def text() -> Tensor:
    """Text states, (2, 77, 768)."""
    return spread((2, *TEXT), salt=1001)


def frame_positions(frames: int) -> Tensor:
    """The table of frame positions (T, WIDTH), one number at a time."""
    half = WIDTH // 2
    table = torch.zeros(frames, WIDTH, dtype=torch.float64)
    for t in range(frames):
        for i in range(half):
            angle = torch.tensor(t / 10_000 ** (i / half), dtype=torch.float64)
            table[t, i], table[t, half + i] = angle.sin(), angle.cos()
    return table


def condition(state: dict[str, Tensor], kind: str, time: float, sample: int) -> tuple[Tensor, Tensor]:
    """What the blocks and the head are told: VDT always sees label 0, Latte's head never the text."""
    exponents = torch.arange(128, dtype=torch.float64) / 128
    angles = time * 10_000.0**-exponents
    waves = torch.cat([angles.cos(), angles.sin()])
    c = linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", waves)))
    if kind in ("vdt", "latte_class"):
        c = c + state["y_embedder.embedding_table.weight"].double()[0 if kind == "vdt" else LABELS[sample]]
    if kind == "latte_text":
        flat = text()[sample].double().flatten()
        return c + linear(state, "text_embedding_projection.1", silu(flat)), c
    return c, c


def affine_normalized(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A layer norm with weights; its eps is torch's usual 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * state[f"{name}.weight"].double() + state[f"{name}.bias"].double()


def over(axis: str, x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Attention of (T, S, D) within each frame ("space") or of each place along time ("time")."""
    if axis == "space":
        return torch.stack([attend(state, name, frame) for frame in x])
    return torch.stack([attend(state, name, x[:, place]) for place in range(x.shape[1])], dim=1)


def reference(state: dict[str, Tensor], latent: Tensor, time: float, sample: int, kind: str) -> Tensor:
    """One clip's output in float64; `latent` is (C, T, H, W), any size that patches fit."""
    _, frames, height, width = latent.shape
    rows, columns = height // PATCH, width // PATCH
    side = max(rows, columns)
    table = positions(side).reshape(side, side, WIDTH)[:rows, :columns].reshape(-1, WIDTH)
    kernel, bias = (state[f"x_embedder.proj.{part}"].double() for part in ("weight", "bias"))
    x = torch.zeros(frames, rows * columns, WIDTH, dtype=torch.float64)
    for t in range(frames):
        for place in range(rows * columns):
            y, z = (PATCH * index for index in divmod(place, columns))
            patch = latent[:, t, y : y + PATCH, z : z + PATCH].double()
            x[t, place] = (kernel * patch).sum(dim=(1, 2, 3)) + bias + table[place]
    c, c_head = (silu(one) for one in condition(state, kind, time, sample))
    in_time = frame_positions(frames)[:, None]

    for i in range(DEPTH):
        name = f"blocks.{i}"
        if i == (0 if kind == "vdt" else 1):
            x = x + in_time
        if kind == "vdt":
            branch = over("time", affine_normalized(state, f"{name}.temporal_norm1", x), state, f"{name}.temporal_attn")
            x = x + linear(state, f"{name}.temporal_fc", branch)
        vectors = linear(state, f"{name}.adaLN_modulation.1", c).split(WIDTH)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        axis = "time" if kind != "vdt" and i % 2 else "space"
        x = x + gate_a * over(axis, normalized(x) * (1 + scale_a) + shift_a, state, f"{name}.attn")
        hidden = linear(state, f"{name}.mlp.fc1", normalized(x) * (1 + scale_m) + shift_m)
        x = x + gate_m * linear(state, f"{name}.mlp.fc2", gelu(hidden))

    shift, scale = linear(state, "final_layer.adaLN_modulation.1", c_head).split(WIDTH)
    x = linear(state, "final_layer.linear", normalized(x) * (1 + scale) + shift)  # (T, S, p p C')
    out = torch.zeros(2 * CHANNELS, frames, height, width, dtype=torch.float64)
    for t in range(frames):
        for place in range(rows * columns):
            y, z = (PATCH * index for index in divmod(place, columns))
            out[:, t, y : y + PATCH, z : z + PATCH] = x[t, place].reshape(PATCH, PATCH, -1).permute(2, 0, 1)
    return out
