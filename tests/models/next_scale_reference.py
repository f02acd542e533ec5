"""A slow, straight-line VAR on weights in the official layout, and the recipe of the golden numbers.

Nothing here imports our networks; everything runs in double precision, one head and one image at a time.

The golden file `golden_next_scale.json` was made by running the official code (FoundationVision/VAR, models/, float32
on a CPU) with the weights that `fill` makes, the tokenizer of `tests.tokenizers.multi_scale_reference` and the inputs
of `inputs`. Entries; <shared> is 0 or 1 for the two forms of adaLN:

    logits/<shared>             teacher-forced logits of both images: 16 values spread over them
    tokens/<shared>/<run>       autoregressive_infer_cfg with the arguments of RUNS: the tokens of each scale
    latent/<shared>/<run>       its f_hat: 16 values
    image/<shared>/<run>      its image: 16 values
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from tests.tokenizers.multi_scale_reference import CHANNELS, SCALES, VOCAB, sampled, spread

__all__ = ["CONFIG", "GOLDEN", "LABELS", "RUNS", "SEED", "fill", "inputs", "logits", "sampled", "spread"]

WIDTH, DEPTH, HEADS, CLASSES = 32, 2, 2, 10
LABELS = [1, 7]
SEED = 3
CONFIG = {
    "scales": SCALES,
    "latent_channels": CHANNELS,
    "vocab_size": VOCAB,
    "num_layers": DEPTH,
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "num_classes": CLASSES,
}
RUNS = {
    "plain": {"cfg": 1.5, "top_k": 9, "top_p": 0.9, "more_smooth": False},
    "all": {"cfg": 4.0, "top_k": 0, "top_p": 0.0, "more_smooth": False},
    "smooth": {"cfg": 3.0, "top_k": 12, "top_p": 0.95, "more_smooth": True},
}

GOLDEN: dict[str, list] = json.loads((Path(__file__).parent / "golden_next_scale.json").read_text())

DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")


def fill(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same official names with arithmetic weights; the derived buffers stay as they are."""
    filled = {}
    for salt, key in enumerate(sorted(state)):
        noise = spread(tuple(state[key].shape), salt)
        if key.endswith(DERIVED):
            filled[key] = state[key]
        elif "scale_mul" in key:
            filled[key] = math.log(4.0) + 0.3 * noise
            filled[key][0, 0] = 6.0  # beyond the limit of log(100)
        elif key.endswith("bias"):
            filled[key] = 0.1 * noise
        elif key.split(".")[-1] == "weight" and "embed" not in key.split(".")[0] and "emb" not in key.split(".")[0]:
            filled[key] = 1.5 * noise / math.sqrt(state[key].shape[1])
        else:
            filled[key] = 0.5 * noise
    return filled


def inputs() -> Tensor:
    """Teacher-forcing inputs of two images, (2, L - 1, C)."""
    return spread((2, sum(side * side for side in SCALES) - 1, CHANNELS), salt=11)


def linear(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    """Apply the linear layer of a name."""
    return x @ state[f"{key}.weight"].double().T + state[f"{key}.bias"].double()


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x / (1 + (-x).exp())


def attend(state: dict[str, Tensor], key: str, x: Tensor, scale_of: list[int]) -> Tensor:
    """Cosine attention, head by head; a token sees its own and coarser scales; (L, D)."""
    part = state[f"{key}.mat_qkv.weight"].double()
    q = x @ part[:WIDTH].T + state[f"{key}.q_bias"].double()
    k = x @ part[WIDTH : 2 * WIDTH].T
    v = x @ part[2 * WIDTH :].T + state[f"{key}.v_bias"].double()
    out, size = torch.zeros_like(x), WIDTH // HEADS
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        sharpness = min(math.exp(state[f"{key}.scale_mul_1H11"][0, head].item()), 100.0)
        for i in range(len(x)):
            seen = [j for j in range(len(x)) if scale_of[j] <= scale_of[i]]
            directions = k[seen, own] / k[seen, own].norm(dim=-1, keepdim=True)
            scores = sharpness * directions @ (q[i, own] / q[i, own].norm())
            out[i, own] = (scores - scores.max()).softmax(0) @ v[seen, own]
    return linear(state, f"{key}.proj", out)


def logits(state: dict[str, Tensor], codes: Tensor, label: int) -> Tensor:
    """Teacher-forced logits (L, V) of one image from its inputs (L - 1, C)."""
    scale_of = [s for s, side in enumerate(SCALES) for _ in range(side * side)]
    condition = state["class_emb.weight"][label].double()
    start = condition + state["pos_start"][0].double()
    x = torch.cat([start, linear(state, "word_embed", codes.double())])
    x = x + state["pos_1LC"][0].double() + state["lvl_embed.weight"].double()[scale_of]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        if f"{block}.ada_gss" in state:
            six = state[f"{block}.ada_gss"][0, 0].double()
            six = six + linear(state, "shared_ada_lin.1", silu(condition)).reshape(6, WIDTH)
        else:
            six = linear(state, f"{block}.ada_lin.1", silu(condition)).reshape(6, WIDTH)
        gate1, gate2, scale1, scale2, shift1, shift2 = six
        x = x + gate1 * attend(state, f"{block}.attn", norm(x) * (1 + scale1) + shift1, scale_of)
        hidden = linear(state, f"{block}.ffn.fc1", norm(x) * (1 + scale2) + shift2)
        hidden = 0.5 * hidden * (1 + (math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)).tanh())
        x = x + gate2 * linear(state, f"{block}.ffn.fc2", hidden)
    scale, shift = linear(state, "head_nm.ada_lin.1", silu(condition)).reshape(2, WIDTH)
    return linear(state, "head", norm(x) * (1 + scale) + shift)
