"""The compressed cache written out slowly: lists of tokens, one head at a time."""

import math

import torch
from torch import Tensor


class SlowCache:
    """Holds (place, key, value) of each row, head and layer in lists."""

    def __init__(self, policy: str, capacities, counts, observe: int, sinks: int, pool: int) -> None:
        self.policy, self.capacities, self.counts = policy, capacities, counts
        self.observe, self.sinks, self.pool = observe, sinks, pool
        self.held: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = {}

    def step(self, layer: int, scale: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, N, K, E) and compress; returns the row before compression, (B, M, K, E)."""
        batch, count, heads, _ = key.shape
        rows_k, rows_v = [], []
        for b in range(batch):
            for h in range(heads):
                row = self.held.get((layer, b, h), [])
                row = row + [(key[b, n, h], value[b, n, h]) for n in range(count)]
                rows_k.append(torch.stack([k for k, _ in row]))
                rows_v.append(torch.stack([v for _, v in row]))
                if scale + 1 < len(self.counts):
                    keep = self.keep(query[b, :, h], rows_k[-1], count, self.capacities[scale + 1][layer])
                    self.held[layer, b, h] = [row[i] for i in keep]
        shape = (batch, heads, -1, key.shape[-1])
        return torch.stack(rows_k).view(shape).transpose(1, 2), torch.stack(rows_v).view(shape).transpose(1, 2)

    def keep(self, query: Tensor, keys: Tensor, count: int, capacity: int) -> list[int]:
        length = len(keys)
        if capacity >= length:
            return list(range(length))
        if self.policy == "window":
            return list(range(length - capacity, length))
        if self.policy == "streaming":
            first = min(self.sinks, capacity // 2)
            return [*range(first), *range(length - capacity + first, length)]
        observers = self.observers(count)
        mass = [0.0] * length
        for w in observers:
            logits = [float(query[w] @ key) / math.sqrt(len(key)) for key in keys]
            top = max(logits)
            weights = [math.exp(one - top) for one in logits]
            for j, weight in enumerate(weights):
                mass[j] += weight / sum(weights)
        half = self.pool // 2
        smooth_scores = [max(mass[max(j - half, 0) : j + half + 1]) + 1e-3 * mass[j] for j in range(length)]
        always = [length - count + w for w in observers[len(observers) - min(len(observers), capacity // 2) :]]
        if capacity == 1:
            always = []
        rest = sorted((j for j in range(length) if j not in always), key=lambda j: -smooth_scores[j])
        return sorted([*always, *rest[: capacity - len(always)]])

    def observers(self, count: int) -> list[int]:
        """Of square maps."""
        if count <= self.observe:
            return list(range(count))
        if self.policy != "scalekv":
            return list(range(count - self.observe, count))
        side, across = math.isqrt(count), math.isqrt(self.observe)
        centres = [i * (side // across) + (side // across - 1) // 2 for i in range(across)]
        return [y * side + x for y in centres for x in centres]
