"""Attention heads of new networks start by attending to neighbours.

From random weights a network learns the names in a caption at once and very late what stands where: it cannot tell
"a left of b" from "b left of a" as long as its heads do not find the neighbours of a word.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipModel, T5EncoderModel

PEAK = 6.0  # score of the position that a head attends to at first
FAR = -6.0  # bias that all but closes one side; scores of a new encoder have about unit variance


def init_t5_attention(encoder: T5EncoderModel) -> None:
    """Set the position biases of a T5 so that of three heads one attends backward, one forward, one both ways.

    T5 knows the order of words only from biases that it adds to scores (arXiv 1910.10683, section 2.1). From random
    ones "a left of b" and "b left of a" still looked alike after 140,000 captions, and a generator never gets a slope
    towards the difference. With linear slopes (as ALiBi's, arXiv 2108.12409) 30,000 sufficed.
    """
    blocks: Any = encoder.encoder.block
    attention = blocks[0].layer[0].SelfAttention
    table = attention.relative_attention_bias.weight  # (buckets, K): keys behind the query, then keys ahead of it
    half = len(table) // 2
    distance = torch.arange(half, dtype=table.dtype)  # (buckets / 2,)
    with torch.no_grad():
        for head in range(table.shape[1]):
            back, ahead = ((-distance, FAR), (FAR, -distance), (-distance / 2, -distance / 2))[head % 3]
            table[:half, head], table[half:, head] = back, ahead


@torch.no_grad()
def init_siglip_attention(clip: SiglipModel) -> None:
    """Set both towers of a SigLIP so that heads of early layers attend one position back, one ahead, two back ...

    It has no relative biases. So position embeddings start as waves in a part of the width that words, patches and
    layers leave alone at first, and queries as keys rotated by some positions: scores then peak that many positions
    away. Heads of the image tower attend left, right, up and down.
    """
    text: Any = clip.text_model
    vision: Any = clip.vision_model
    words, patches = text.embeddings.token_embedding.weight, vision.embeddings.patch_embedding  # (V, D); (D, 3, P, P)
    words.normal_()  # as large as the waves, and both larger than what layers add
    *early, _ = text.encoder.layers
    length = len(text.embeddings.position_embedding.weight)
    heads = early[0].self_attn.num_heads
    offsets = [((head // 2 + 1) * (-1.0) ** (head + 1),) for head in range(heads)]  # -1, 1, -2, 2 ...
    used = _init_tower(text.embeddings.position_embedding, early, torch.arange(length)[:, None], offsets)
    words[:, :used] = 0
    side = math.isqrt(len(vision.embeddings.position_embedding.weight))
    early = vision.encoder.layers[: len(vision.encoder.layers) // 2]
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (N, 2)
    around = [(0.0, -1.0), (0.0, 1.0), (-1.0, 0.0), (1.0, 0.0)]
    heads = vision.config.num_attention_heads
    used = _init_tower(vision.embeddings.position_embedding, early, grid, [around[head % 4] for head in range(heads)])
    patches.weight[:used] = 0
    patches.bias[:used] = 0


def _init_tower(embedding: nn.Embedding, layers: Any, grid: Tensor, offsets: Sequence[tuple[float, ...]]) -> int:
    """Write waves into position embeddings, and into layers the queries and keys that find them at an offset.

    Args:
        embedding: Positions of a tower, (N, D).
        layers: Its early ones.
        grid: Coordinates of each position, (N, axes).
        offsets: For each head how far away it attends along each axis.

    Returns:
        How many of the first channels the waves use.
    """
    table: Any = embedding.weight  # (N, D)
    count, axes = grid.shape
    head_dim = table.shape[1] // len(offsets)
    waves = min(table.shape[1] // 4, head_dim // 2) // axes  # for each axis
    octaves = min(4.0, math.log2(max(count ** (1 / axes), 2)))
    rates = math.pi * 0.5 ** torch.linspace(0, octaves, waves)  # (W,) radians a position, from half a turn
    phases = (grid[:, :, None] * rates).flatten(1)  # (N, axes W)
    used = 2 * phases.shape[1]
    table[:, :used] = math.sqrt(2) * torch.cat([phases.sin(), phases.cos()], dim=1)
    gain = math.sqrt(PEAK * math.sqrt(head_dim) / phases.shape[1])
    for layer in layers:
        for head, offset in enumerate(offsets):
            angle = (torch.tensor(offset)[:, None] * rates).flatten()  # (axes W,)
            cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
            rotation = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])  # of (sin, cos), by that offset
            rows = slice(head * head_dim, head * head_dim + used)
            for projection, start in ((layer.self_attn.q_proj, rotation), (layer.self_attn.k_proj, torch.eye(used))):
                projection.weight[rows] = 0
                projection.weight[rows, :used] = gain * start
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            last.weight[:used] = 0
    return used
