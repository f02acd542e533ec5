"""A slow, straight-line Infinity on weights in the official layout, and the recipe of the golden numbers.

Nothing here imports our networks; everything runs in double precision, one head and one image at a time.

The golden file `golden_infinity.json` was made by running the official code (FoundationVision/Infinity,
infinity/models/, float32 on a CPU, fused norms, the casts to bfloat16 around the kernel of cross-attention taken out)
with the weights that `fill` makes and the inputs of `inputs` and `texts`. Entries, for each of CASES:

    <case>/logits          teacher-forced logits of both images: 16 values spread over them
    <case>/bits/<run>      autoregressive_infer_cfg with the arguments of RUNS: a digest of each scale's bits
    <case>/latent/<run>    the sum of its codes: 16 values
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tokenizers.multi_scale_reference import sampled, spread

WIDTH, DEPTH, HEADS, TEXT, LONGEST = 64, 2, 2, 256, 12
POOL_HEADS = TEXT // 128
SEED = 7
TALL = ((1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16))
WIDE = ((1, 1), (2, 2), (2, 3), (4, 6), (6, 9), (10, 15), (14, 21))
CASES: dict[str, dict[str, Any]] = {
    "wide": {"grids": WIDE, "whole": (52, 78), "bits": 6, "patchify": 1},
    "patchify": {"grids": TALL, "whole": (70, 56), "bits": 3, "patchify": 2},
}
RUNS: dict[str, dict[str, Any]] = {
    "guided": {"cfg": 3.0, "tau": 0.5, "top_k": 900, "top_p": 0.97, "negative": False},
    "lists": {
        "cfg": [1.0, 2.0, 3.0, 4.0, 1.0, 5.0, 2.5],
        "tau": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        "top_k": 0,
        "top_p": 0.0,
        "negative": True,
    },
    "free": {"cfg": 1.0, "tau": 1.0, "top_k": 0, "top_p": 0.9, "negative": False},
}

GOLDEN: dict[str, list] = json.loads((Path(__file__).parent / "golden_infinity.json").read_text())


def config(case: str) -> dict[str, Any]:
    """Arguments of our network."""
    return {
        "scales": CASES[case]["grids"],
        "latent_channels": CASES[case]["bits"],
        "patchify": CASES[case]["patchify"],
        "num_layers": DEPTH,
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH // HEADS,
        "shared_modulation": True,
        "text_dim": TEXT,
        "text_max_length": LONGEST,
        "text_pool_heads": POOL_HEADS,
        "bitwise": True,
        "positions": "rotary",
        "max_scales": 15,
    }


def fill(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same official names with arithmetic weights; the zeros of the keys stay."""
    filled = {}
    for salt, key in enumerate(sorted(state)):
        noise = spread(tuple(state[key].shape), salt)
        if key.endswith("zero_k_bias"):
            filled[key] = state[key]
        elif "scale_mul" in key:
            filled[key] = math.log(4.0) + 0.3 * noise
            filled[key].view(-1)[0] = 6.0  # beyond the limit of log(100)
        elif key.endswith("norm.weight"):
            filled[key] = 1 + 0.2 * noise
        elif key.endswith("bias"):
            filled[key] = 0.1 * noise
        elif key.endswith("weight") and "embed" not in key:
            filled[key] = 1.5 * noise / math.sqrt(state[key].shape[1])
        else:
            filled[key] = 0.5 * noise
    return filled


def inputs(case: str) -> Tensor:
    """Teacher-forcing inputs of two images, (2, L - 1, d p p)."""
    numbers = CASES[case]["bits"] * CASES[case]["patchify"] ** 2
    return spread((2, sum(rows * columns for rows, columns in CASES[case]["grids"]) - 1, numbers), salt=11)


def texts(negative: bool = False) -> tuple[Tensor, Tensor]:
    """Text states (2, M, Dt) of two prompts of different lengths, and their mask (2, M)."""
    lengths = torch.tensor([7, 3] if negative else [9, 5])
    longest = int(lengths.max())
    return spread((2, longest, TEXT), salt=23 + negative), torch.arange(longest) < lengths[:, None]


def digest(bits: Tensor) -> str:
    """A short name of the bits (B, N, d) of a scale."""
    return hashlib.sha256(bytes(bits.flatten().int().tolist())).hexdigest()[:12]


def linear(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    """Apply the linear layer of a name."""
    return x @ state[f"{key}.weight"].double().T + state[f"{key}.bias"].double()


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    """The approximation by tanh."""
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x / (1 + (-x).exp())


def turn(x: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """Turn pairs of channels of one head (L, E): the first half by the row, the second by the column."""
    size = x.shape[1]
    turned = torch.empty_like(x)
    for pair in range(size // 2):
        axis, index = divmod(pair, size // 4)
        angle = torch.tensor([place[axis] * 10000.0 ** (-2 * index / (size / 2)) for place in places]).double()
        a, b = x[:, 2 * pair], x[:, 2 * pair + 1]
        turned[:, 2 * pair] = a * angle.cos() - b * angle.sin()
        turned[:, 2 * pair + 1] = a * angle.sin() + b * angle.cos()
    return turned


def places_of(case: str) -> list[tuple[int, int]]:
    """Row and column of every token on the map of a million pixels."""
    (height, width), places = CASES[case]["whole"], []
    for rows, columns in CASES[case]["grids"]:
        places += [
            (round(y * (height / rows)), round(x * (width / columns))) for y in range(rows) for x in range(columns)
        ]
    return places


def attend(state: dict[str, Tensor], key: str, x: Tensor, case: str) -> Tensor:
    """Cosine attention over turned directions, head by head; a token sees its own and coarser scales; (L, D)."""
    scale_of = torch.tensor(
        [s for s, (rows, columns) in enumerate(CASES[case]["grids"]) for _ in range(rows * columns)]
    )
    hidden = scale_of[:, None] < scale_of[None, :]
    part = state[f"{key}.mat_qkv.weight"].double()
    q = x @ part[:WIDTH].T + state[f"{key}.q_bias"].double()
    k = x @ part[WIDTH : 2 * WIDTH].T
    v = x @ part[2 * WIDTH :].T + state[f"{key}.v_bias"].double()
    out, size = torch.zeros_like(x), WIDTH // HEADS
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        sharpness = min(math.exp(state[f"{key}.scale_mul_1H11"].flatten()[head].item()), 100.0)
        directions = [turn(one[:, own] / one[:, own].norm(dim=-1, keepdim=True), places_of(case)) for one in (q, k)]
        scores = (sharpness * directions[0] @ directions[1].T).masked_fill(hidden, -math.inf)
        out[:, own] = scores.softmax(-1) @ v[:, own]
    return linear(state, f"{key}.proj", out)


def look(state: dict[str, Tensor], key: str, query: Tensor, text: Tensor) -> Tensor:
    """Heads of queries (K, N, E) at a text (M, Dt), projected, (N, D)."""
    keys, values = (text @ state[f"{key}.mat_kv.weight"].double().T).chunk(2, dim=-1)
    values = values + state[f"{key}.v_bias"].double()
    size, out = query.shape[-1], []
    for head, one in enumerate(query):
        own = slice(head * size, (head + 1) * size)
        out.append((one @ keys[:, own].T / math.sqrt(size)).softmax(-1) @ values[:, own])
    return linear(state, f"{key}.proj", torch.cat(out, dim=-1))


def logits(state: dict[str, Tensor], codes: Tensor, text: Tensor, case: str) -> Tensor:
    """Teacher-forced logits (L, 2 d p p) of one image from its inputs (L - 1, d p p) and text (M, Dt)."""
    text = text.double()
    text = text / (text.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state["text_norm.weight"].double()
    condition = look(state, "text_proj_for_sos.ca", state["text_proj_for_sos.ca.mat_q"][0, :, None].double(), text)
    read = linear(state, "text_proj_for_ca.2", gelu(linear(state, "text_proj_for_ca.0", text)))
    x = torch.cat([condition + state["pos_start"][0].double(), linear(state, "word_embed", codes.double())])
    scale_of = [s for s, (rows, columns) in enumerate(CASES[case]["grids"]) for _ in range(rows * columns)]
    x = x + state["lvl_embed.weight"].double()[scale_of]
    shared = linear(state, "shared_ada_lin.1", silu(condition)).reshape(6, WIDTH)
    for i in range(DEPTH):
        block = f"block_chunks.{i}.module.0"
        gate1, gate2, scale1, scale2, shift1, shift2 = state[f"{block}.ada_gss"][0, 0].double() + shared
        x = x + gate1 * attend(state, f"{block}.sa", norm(x) * (1 + scale1) + shift1, case)
        seen = norm(x) * state[f"{block}.ca_norm.weight"].double() + state[f"{block}.ca_norm.bias"].double()
        query = linear(state, f"{block}.ca.mat_q", seen).unflatten(-1, (HEADS, -1)).transpose(0, 1)  # (K, L, E)
        x = x + look(state, f"{block}.ca", query, read)
        hidden = gelu(linear(state, f"{block}.ffn.fc1", norm(x) * (1 + scale2) + shift2))
        x = x + gate2 * linear(state, f"{block}.ffn.fc2", hidden)
    scale, shift = linear(state, "head_nm.ada_lin.1", silu(condition)).reshape(2, WIDTH)
    return linear(state, "head", norm(x) * (1 + scale) + shift)


__all__ = [
    "CASES",
    "GOLDEN",
    "RUNS",
    "SEED",
    "config",
    "digest",
    "fill",
    "inputs",
    "logits",
    "sampled",
    "spread",
    "texts",
]
