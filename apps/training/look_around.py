"""Where the attention heads of a new pair of towers look at first: at their neighbours."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SiglipModel

PEAK = 6.0  # score of the place that a head starts by looking at


@torch.no_grad()
def look_around(clip: SiglipModel) -> None:
    """Starts both towers with a view: heads of the early layers look one place back, one ahead, two back ...

    From random positions towers learn names at once and very late what stands where; see
    `apps.training.text_encoder.look_nearby`. Here are no relative biases, so positions start as waves in a part of the
    width that words, patches and layers leave alone at first, and queries as keys turned by some places: scores then
    peak that many places away. Heads of images look left, right, up and down.
    """
    text: Any = clip.text_model
    vision: Any = clip.vision_model
    words, patches = text.embeddings.token_embedding.weight, vision.embeddings.patch_embedding  # (V, D); (D, 3, P, P)
    words.normal_()  # as loud as places, and both louder than what layers add
    *early, _ = text.encoder.layers
    length = len(text.embeddings.position_embedding.weight)
    heads = early[0].self_attn.num_heads
    steps = [((head // 2 + 1) * (-1.0) ** (head + 1),) for head in range(heads)]  # -1, 1, -2, 2 ...
    used = _see(text.embeddings.position_embedding, early, torch.arange(length)[:, None], steps)
    words[:, :used] = 0
    side = math.isqrt(len(vision.embeddings.position_embedding.weight))
    early = vision.encoder.layers[: len(vision.encoder.layers) // 2]
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (N, 2)
    around = [(0.0, -1.0), (0.0, 1.0), (-1.0, 0.0), (1.0, 0.0)]
    heads = vision.config.num_attention_heads
    used = _see(vision.embeddings.position_embedding, early, places, [around[head % 4] for head in range(heads)])
    patches.weight[:used] = 0
    patches.bias[:used] = 0


def _see(positions: nn.Embedding, layers: Any, places: Tensor, steps: Sequence[tuple[float, ...]]) -> int:
    """Writes waves into positions, and queries and keys that find them some steps away into layers.

    Args:
        positions: of a tower, (N, D).
        layers: its early ones.
        places: of each position, (N, axes).
        steps: for each head how far it looks along each axis.

    Returns:
        How many of the first channels the waves use.
    """
    table: Any = positions.weight  # (N, D)
    count, axes = places.shape
    head_dim = table.shape[1] // len(steps)
    waves = min(table.shape[1] // 4, head_dim // 2) // axes  # for each axis
    octaves = min(4.0, math.log2(max(count ** (1 / axes), 2)))
    rates = math.pi * 0.5 ** torch.linspace(0, octaves, waves)  # (W,) from half a turn a place
    phases = (places[:, :, None] * rates).flatten(1)  # (N, axes W)
    used = 2 * phases.shape[1]
    table[:, :used] = math.sqrt(2) * torch.cat([phases.sin(), phases.cos()], dim=1)
    gain = math.sqrt(PEAK * math.sqrt(head_dim) / phases.shape[1])
    for layer in layers:
        for head, step in enumerate(steps):
            turn = (torch.tensor(step)[:, None] * rates).flatten()  # (axes W,)
            cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
            turned = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])  # of (sin, cos), by that step
            rows = slice(head * head_dim, head * head_dim + used)
            for one, start in ((layer.self_attn.q_proj, turned), (layer.self_attn.k_proj, torch.eye(used))):
                one.weight[rows] = 0
                one.weight[rows, :used] = gain * start
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            last.weight[:used] = 0
    return used
