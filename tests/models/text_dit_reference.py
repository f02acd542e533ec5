"""TextDiT written out slowly in float64, one token and one head at a time, from its description and not its code."""

import math

import torch
from torch import Tensor

from dit.models.text_dit import TextDiT


def reference(
    model: TextDiT, latents: Tensor, text: Tensor, timestep: Tensor, mask: Tensor, frame_rate: float = 0.0
) -> Tensor:
    """The velocity of one image or clip a row; latents (B, C, T, H, W), text (B, L, Dt), mask (B, L)."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    rows = zip(latents.double(), text.double(), timestep.double(), mask, strict=True)
    return torch.stack([_one(model.config, state, *row, frame_rate) for row in rows])


def _one(config, state, latent: Tensor, text: Tensor, t: Tensor, mask: Tensor, frame_rate: float) -> Tensor:
    heads, width = config.num_attention_heads, config.attention_head_dim
    p, pt = config.patch_size, config.patch_size_t
    grid = (latent.shape[1] // pt, latent.shape[2] // p, latent.shape[3] // p)
    cells = [(a, b, c) for a in range(grid[0]) for b in range(grid[1]) for c in range(grid[2])]

    text = text[mask]  # the masked tokens are not there at all
    tokens = []
    for index, token in enumerate(text):
        slow = [100 ** (-i / config.text_position_frequencies) for i in range(config.text_position_frequencies)]
        waves = [math.cos(index * f) for f in slow] + [math.sin(index * f) for f in slow]
        place = state["text_position_embed.weight"] @ torch.tensor(waves, dtype=torch.float64)
        tokens.append(_linear(state, "context_embedder", token) + place)
    for a, b, c in cells:
        patch = latent[:, a * pt : (a + 1) * pt, b * p : (b + 1) * p, c * p : (c + 1) * p]
        token = _linear(state, "patch_embed", patch.permute(1, 2, 3, 0).reshape(-1))
        places = [(i + 0.5) / n for i, n in zip((a, b, c), grid, strict=True)]
        waves = [math.pi * 2**k * place for place in places for k in range(config.coordinate_frequencies)]
        waves = torch.tensor([math.sin(w) for w in waves] + [math.cos(w) for w in waves], dtype=torch.float64)
        tokens.append(token + state["coordinate_embed.weight"] @ waves)
    positions = [(0, 0, 0)] * len(text) + cells
    x = torch.stack(tokens)

    half = 128
    angles = [float(t) * math.exp(-math.log(10_000) * i / half) for i in range(half)]
    waves = torch.tensor([math.cos(v) for v in angles] + [math.sin(v) for v in angles], dtype=torch.float64)
    condition = _linear(state, "time_embed.linear_2", _silu(_linear(state, "time_embed.linear_1", waves)))
    pooled = _linear(state, "pooled_embedder.0", text.mean(0))
    condition = condition + _linear(state, "pooled_embedder.2", _silu(pooled))
    if config.clip_conditioning:
        waves = []
        for value in (frame_rate, grid[0]):
            angles = [value * 200 ** (-i / 16) for i in range(16)]
            waves += [math.cos(v) for v in angles] + [math.sin(v) for v in angles]
        condition = condition + _linear(state, "clip_embed", torch.tensor(waves, dtype=torch.float64))
    shared = _linear(state, "adaln_single.linear", _silu(condition)).reshape(6, -1)

    for index in range(config.num_layers):
        name = f"transformer_blocks.{index}"
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = shared + state[f"{name}.scale_shift_table"]
        over_time = config.space_time == "factorised" and grid[0] > 1
        if over_time:
            x = _over_time(state, f"{name}.attn_time", x, positions, len(text), heads, width, config.rope_theta)
        y = torch.stack([_layer_norm(row) * (1 + scale_a) + shift_a for row in x])
        groups = [[n for n, place in enumerate(positions) if n < len(text) or place[0] == a] for a in range(grid[0])]
        attended = torch.zeros_like(x)
        for group in groups if over_time else [list(range(len(x)))]:
            found = _attention(
                state, f"{name}.attn", y[group], [positions[n] for n in group], heads, width, config.rope_theta
            )
            for n, row in zip(group, found, strict=True):
                attended[n] += row / (len(groups) if over_time and n < len(text) else 1)
        x = x + gate_a * attended
        y = torch.stack([_layer_norm(row) * (1 + scale_f) + shift_f for row in x])
        value, gate = _linear(state, f"{name}.ff.net.0.proj", y).chunk(2, dim=-1)
        x = x + gate_f * _linear(state, f"{name}.ff.net.2", value * _silu(gate))

    shift, scale = state["scale_shift_table"] + condition
    out = torch.zeros(config.in_channels, *latent.shape[1:], dtype=torch.float64)
    for (a, b, c), row in zip(cells, x[len(text) :], strict=True):
        patch = _linear(state, "proj_out", _layer_norm(row) * (1 + scale) + shift).reshape(pt, p, p, -1)
        out[:, a * pt : (a + 1) * pt, b * p : (b + 1) * p, c * p : (c + 1) * p] = patch.permute(3, 0, 1, 2)
    return out


def _over_time(
    state, name: str, x: Tensor, positions: list, length: int, heads: int, width: int, theta: float
) -> Tensor:
    """Every place of the frame attends to itself in all frames."""
    x = x.clone()
    for place in {position[1:] for position in positions[length:]}:
        rows = [n for n, position in enumerate(positions) if n >= length and position[1:] == place]
        y = torch.stack([_layer_norm(x[n]) for n in rows])
        x[rows] = x[rows] + _attention(state, name, y, [(positions[n][0], 0, 0) for n in rows], heads, width, theta)
    return x


def _attention(state, name: str, x: Tensor, positions: list, heads: int, width: int, theta: float) -> Tensor:
    query, key, value = (_linear(state, f"{name}.to_{part}", x) for part in "qkv")
    space = width * 3 // 8 // 2 * 2
    axes = (width - 2 * space, space, space)
    parts = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        q = torch.stack([_turn(_rms(row, state[f"{name}.norm_q.weight"]), p, axes, theta)
                         for row, p in zip(query[:, part], positions, strict=True)])  # fmt: skip
        k = torch.stack([_turn(_rms(row, state[f"{name}.norm_k.weight"]), p, axes, theta)
                         for row, p in zip(key[:, part], positions, strict=True)])  # fmt: skip
        parts.append((q @ k.T / math.sqrt(width)).softmax(-1) @ value[:, part])
    return _linear(state, f"{name}.to_out.0", torch.cat(parts, dim=-1))


def _turn(vector: Tensor, position: tuple, axes: tuple, theta: float) -> Tensor:
    out, start = vector.clone(), 0
    for place, width in zip(position, axes, strict=True):
        for i in range(0, width, 2):
            angle = place * theta ** (-i / width)
            a, b = vector[start + i].item(), vector[start + i + 1].item()
            out[start + i] = a * math.cos(angle) - b * math.sin(angle)
            out[start + i + 1] = a * math.sin(angle) + b * math.cos(angle)
        start += width
    return out


def _linear(state, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())
