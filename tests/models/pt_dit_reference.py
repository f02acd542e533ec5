"""A slow, straight-line PT-DiT on weights in the official layout, and the recipe of the golden numbers.

Nothing here imports our networks. Windows are never cut out: who may look at whom follows from the number of the window
that each token lies in, which also says what happens on grids that windows don't fit.

The golden file `golden_pt_dit.json` was made by running the official code (Ascend/MindSpeed-MM,
mindspeed_mm/models/predictor/dits/pt_dit_diffusers.py, commit 57069cd; float32 on a CPU, torch_npu replaced by an empty
module) with the weights of `official_state` and the inputs of `latents`, `text` and `MASK`. Each entry `<case>/<time>`
holds 16 values spread over the output.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests.models.dit_reference import gelu, linear, normalized, silu, spread

WIDTH, DEPTH, HEADS, PATCH, CHANNELS, TEXT_DIM, LENGTH = 48, 2, 4, 2, 4, 20, 5
SIZE = 16
TIMES = (20.0, 800.0)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

GOLDEN: dict[str, list[float]] = json.loads((Path(__file__).parent / "golden_pt_dit.json").read_text())

Sizes = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A clip and the windows that its network has."""

    frames: int
    window: Sizes
    proxies: Sizes  # of a window


CASES = {
    "image": Case(1, (1, 4, 4), (1, 1, 1)),
    "clip": Case(4, (1, 4, 4), (1, 2, 2)),
    "long": Case(16, (4, 4, 4), (1, 2, 2)),
}


@cache
def official_state(frames: int) -> dict[str, Tensor]:
    """Weights of the small test model in the official layout; not to be changed in place."""
    embedder = "adaln_single.emb.timestep_embedder"
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.proj": (WIDTH, CHANNELS, PATCH, PATCH),
        f"{embedder}.linear_1": (WIDTH, 256),
        f"{embedder}.linear_2": (WIDTH, WIDTH),
        "adaln_single.linear": (6 * WIDTH, WIDTH),
        "caption_projection.linear_1": (WIDTH, TEXT_DIM),
        "caption_projection.linear_2": (WIDTH, WIDTH),
        "proj_out": (PATCH * PATCH * 2 * CHANNELS, WIDTH),
    }
    tables = {"scale_shift_table": 2}
    for i in range(DEPTH):
        block = f"transformer_blocks.{i}"
        for attention in ("proxy_attn1", "pvisual_attn2", "attn1", "attn3", "attn2"):
            shapes |= {f"{block}.{attention}.{part}": (WIDTH, WIDTH) for part in ("to_q", "to_k", "to_v", "to_out.0")}
        shapes |= {
            f"{block}.linear_1_visual": (WIDTH, WIDTH),
            f"{block}.linear_2": (WIDTH, WIDTH),
            f"{block}.ff.net.0.proj": (4 * WIDTH, WIDTH),
            f"{block}.ff.net.2": (WIDTH, 4 * WIDTH),
        }
        tables |= {f"{block}.scale_shift_table": 6, f"{block}.proxy_scale_shift_table": 3}
    state = {}
    for salt, (name, shape) in enumerate(shapes.items(), start=1):
        state[f"{name}.weight"] = spread(shape, salt) / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = 0.2 * spread(shape[:1], salt + 100)
    for salt, (name, rows) in enumerate(tables.items(), start=200):
        state[name] = 0.5 * spread((rows, WIDTH), salt)
    side = SIZE // PATCH
    table = torch.stack([position(cell) for cell in cells((frames, side, side))])
    return {**state, "pos_embed.pos_embed": table.float().reshape(1, frames, side * side, WIDTH)}


def latents(frames: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """The noisy latents, (2, C, T, H, W)."""
    return spread((2, CHANNELS, frames, height, width), salt=1000)


def text() -> Tensor:
    """Text states, (2, L, Dt)."""
    return spread((2, LENGTH, TEXT_DIM), salt=1001)


def cells(grid: Sizes) -> list[Sizes]:
    """All (frame, row, column), row-major."""
    return [(t, y, x) for t in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]


def position(cell: Sizes) -> Tensor:
    """A token's position vector (D,): a quarter for the frame, then three eighths for the column and for the row."""
    t, y, x = cell
    parts = []
    for value, width in ((t, WIDTH // 4), (x, 3 * WIDTH // 8), (y, 3 * WIDTH // 8)):
        angles = [value / 10_000 ** (i / (width // 2)) for i in range(width // 2)]
        parts += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(parts, dtype=torch.float64)


def together(grid: Sizes, window: Sizes, shift: Sizes) -> Tensor:
    """Who lies in one window, bool (N, N): windows begin at `shift`, and what stands before it is a window too."""
    numbers = [tuple((p - s) // w for p, s, w in zip(cell, shift, window, strict=True)) for cell in cells(grid)]
    return torch.tensor([[one == other for other in numbers] for one in numbers])


def averages(grid: Sizes, case: Case) -> Tensor:
    """The matrix (P, N) that averages tokens into proxies: of a window those whose places are equal modulo groups."""
    keys = [
        tuple((p // w, p % w % g) for p, w, g in zip(cell, case.window, case.proxies, strict=True))
        for cell in cells(grid)
    ]
    names = sorted(set(keys))
    member = torch.tensor([[key == name for key in keys] for name in names], dtype=torch.float64)
    return member / member.sum(1, keepdim=True)


def attend(state: dict[str, Tensor], name: str, x: Tensor, y: Tensor, may: Tensor | None = None) -> Tensor:
    """Attention of tokens x (N, D) to tokens y (M, D), head by head; `may` is bool (N, M)."""
    q, k, v = linear(state, f"{name}.to_q", x), linear(state, f"{name}.to_k", y), linear(state, f"{name}.to_v", y)
    width = WIDTH // HEADS
    heads = []
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        scores = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(width))
        scores = scores if may is None else scores * may
        heads.append(scores / scores.sum(-1, keepdim=True) @ v[:, part])
    return linear(state, f"{name}.to_out.0", torch.cat(heads, dim=1))


def block(
    state: dict[str, Tensor], name: str, x: Tensor, words: Tensor, six: Tensor, grid: Sizes, case: Case
) -> Tensor:
    """One block on the tokens (N, D) of a clip."""
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = state[f"{name}.scale_shift_table"].double() + six
    shift_s, scale_s, gate_s = state[f"{name}.proxy_scale_shift_table"].double() + six[:3]

    proxies = averages(grid, case) @ x
    proxies = proxies + attend(state, f"{name}.proxy_attn1", normalized(proxies), normalized(proxies))
    told = attend(state, f"{name}.pvisual_attn2", normalized(x), normalized(proxies))
    x = x + linear(state, f"{name}.linear_1_visual", told)

    y = normalized(x) * (1 + scale_a) + shift_a
    x = x + gate_a * attend(state, f"{name}.attn1", y, y, together(grid, case.window, (0, 0, 0)))
    y = normalized(x) * (1 + scale_s) + shift_s
    half = tuple(side // 2 for side in case.window)
    y = gate_s * attend(state, f"{name}.attn3", y, y, together(grid, case.window, half))
    x = x + linear(state, f"{name}.linear_2", y)

    x = x + attend(state, f"{name}.attn2", x, words)
    hidden = linear(state, f"{name}.ff.net.0.proj", normalized(x) * (1 + scale_f) + shift_f)
    return x + gate_f * linear(state, f"{name}.ff.net.2", gelu(hidden))


def reference(state: dict[str, Tensor], latent: Tensor, time: float, sample: int, case: Case) -> Tensor:
    """One clip's output in float64; `latent` is (C, T, H, W), any size that patches fit."""
    _, frames, height, width = latent.shape
    grid = (frames, height // PATCH, width // PATCH)
    kernel, bias = (state[f"pos_embed.proj.{part}"].double() for part in ("weight", "bias"))
    tokens = []
    for t, row, column in cells(grid):
        y, z = row * PATCH, column * PATCH
        patch = latent[:, t, y : y + PATCH, z : z + PATCH].double()
        tokens.append((kernel * patch).sum(dim=(1, 2, 3)) + bias + position((t, row, column)))
    x = torch.stack(tokens)

    angles = time * 10_000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    c = linear(state, "adaln_single.emb.timestep_embedder.linear_1", torch.cat([angles.cos(), angles.sin()]))
    c = linear(state, "adaln_single.emb.timestep_embedder.linear_2", silu(c))
    six = linear(state, "adaln_single.linear", silu(c)).reshape(6, WIDTH)
    words = text()[sample][MASK[sample].bool()].double()
    words = linear(state, "caption_projection.linear_2", gelu(linear(state, "caption_projection.linear_1", words)))

    for i in range(DEPTH):
        x = block(state, f"transformer_blocks.{i}", x, words, six, grid, case)

    shift, scale = state["scale_shift_table"].double() + c
    x = linear(state, "proj_out", normalized(x) * (1 + scale) + shift)
    out = torch.zeros(2 * CHANNELS, frames, height, width, dtype=torch.float64)
    for token, (t, row, column) in zip(x, cells(grid), strict=True):
        y, z = row * PATCH, column * PATCH
        out[:, t, y : y + PATCH, z : z + PATCH] = token.reshape(PATCH, PATCH, -1).permute(2, 0, 1)
    return out
