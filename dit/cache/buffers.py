"""Memory layouts of keys and values: everything without a copy, or what a plan keeps plus a workspace.

Both take a layer's new tokens (`append`) and return history and new tokens as one sequence; afterwards `evict` decides
what stays. Sizes are known before the first scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dit.cache.plan import CachePlan
from dit.cache.policies import select_tokens
from dit.cache.storage import ExactTokens, Int8Tokens, StoredTokens, segment_nbytes, token_nbytes
from dit.layers.scales import Grid
from dit.runtime.layer_context import head_scope

KeyValue = tuple[Tensor, Tensor]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries (B, N, K, E), keys and values (B, M, K, E) to (B, N, K, E)."""


class StackedBuffers:
    """Everything but the last scale, in two buffers that serve all layers.

    The queries of the last scale need a row of keys in which history and current scale are neighbours, and copying the
    history for that would cost as much as storing. Hence the order in memory: tokens are the first axis, and the layers
    are stored in reverse, the last layer first,

        | layer 2: history | layer 1: history | layer 0: history |

    so the last scale of a layer is written behind its history, over the histories of earlier layers, which are no
    longer needed. Only layer 0 has no such space; its heads are concatenated and attend one by one.

    Args:
        token_counts: tokens of each scale.
        num_layers: layers.
        shape: rows B, heads K, head width E.
        dtype: of keys and values.
        device: where the buffers live.
    """

    def __init__(
        self,
        token_counts: Sequence[int],
        num_layers: int,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        self.num_layers, self.num_scales = num_layers, len(token_counts)
        self.history, self.last = sum(token_counts[:-1]), token_counts[-1]
        slots = num_layers * self.history + (max(self.last - self.history, 0) if num_layers > 1 else 0)
        self.keys = torch.empty(slots, *shape, dtype=dtype, device=device)  # (T, B, K, E)
        self.values = torch.empty_like(self.keys)  # (T, B, K, E)
        self.lengths = [0] * num_layers

    @property
    def token_nbytes(self) -> int:
        """Bytes of a token: keys and values, all rows and heads."""
        return 2 * self.keys[0].numel() * self.keys.element_size()

    def layer_nbytes(self, layer: int) -> int:
        """Return bytes of the tokens that a layer holds."""
        return self.lengths[layer] * self.token_nbytes

    def planned_nbytes(self, plan: CachePlan) -> int:
        """Return the most bytes that a plan stores between two scales."""
        return max(sum(row) for row in plan.capacities) * self.token_nbytes

    @property
    def peak_nbytes(self) -> int:
        """Bytes of the buffers, and of the last scale's row of one head of layer 0."""
        row = (self.history + self.last) * self.token_nbytes // self.keys.shape[2]
        return self.keys.nbytes + self.values.nbytes + row

    def has_space(self, layer: int, count: int) -> bool:
        """Return whether `count` new tokens of a layer can stand behind its history."""
        start = (self.num_layers - 1 - layer) * self.history
        limit = start + self.history if layer == 0 else len(self.keys)
        return start + self.lengths[layer] + count <= limit

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Write new tokens (B, N, K, E) behind a layer's history; returns the whole row, (B, M, K, E).

        Views where there is space, see `has_space`; else a copy.
        """
        start = (self.num_layers - 1 - layer) * self.history
        past = start + self.lengths[layer]
        end = past + key.shape[1]
        # no space behind the history: concatenate a copy
        if not self.has_space(layer, key.shape[1]):
            self.lengths[layer] += key.shape[1]
            held = (self.keys[start:past].transpose(0, 1), self.values[start:past].transpose(0, 1))  # (B, T, K, E)
            return torch.cat([held[0], key], dim=1), torch.cat([held[1], value], dim=1)
        # write in place and return views
        self.keys[past:end] = key.transpose(0, 1)  # (N, B, K, E)
        self.values[past:end] = value.transpose(0, 1)  # (N, B, K, E)
        self.lengths[layer] += key.shape[1]
        return self.keys[start:end].transpose(0, 1), self.values[start:end].transpose(0, 1)  # (B, M, K, E)

    def attend_by_head(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Attend new tokens (B, N, K, E) that have no space in the buffers, one head at a time; (B, N, K, E).

        Each call of `attend` sees one head, and `current_layer().heads` says which.
        """
        start = (self.num_layers - 1 - layer) * self.history
        past = start + self.lengths[layer]
        out = []
        for head in range(key.shape[2]):
            one = slice(head, head + 1)
            keys = torch.cat([self.keys[start:past, :, one].transpose(0, 1), key[:, :, one]], dim=1)  # (B, M, 1, E)
            values = torch.cat([self.values[start:past, :, one].transpose(0, 1), value[:, :, one]], dim=1)
            with head_scope(range(head, head + 1)):
                out.append(attend(query[:, :, one], keys, values))  # (B, N, 1, E)
        self.lengths[layer] = 0
        return torch.cat(out, dim=2)  # (B, N, K, E)

    def evict(self, layer: int, scale: int, query: Tensor, grid: Grid | None) -> None:
        """Keep everything; nothing after the last scale."""
        if scale == self.num_scales - 1:
            self.lengths[layer] = 0

    def stored(self, layer: int) -> KeyValue:
        """Return the keys and values of a layer, (B, K, T, E) views."""
        start = (self.num_layers - 1 - layer) * self.history
        end = start + self.lengths[layer]
        return self.keys[start:end].permute(1, 2, 0, 3), self.values[start:end].permute(1, 2, 0, 3)

    def select(self, rows: Tensor) -> None:
        """Choose rows by indices (B',)."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)

    def reset(self) -> None:
        """Forget everything."""
        self.lengths = [0] * self.num_layers


class PackedBuffers:
    """What a plan keeps, layer by layer, and one workspace in which a layer's row is joined for its attention.

    Args:
        plan: what to keep.
        shape: rows B, heads K, head width E.
        dtype: of keys and values as the network makes them.
        device: where the buffers live.
        kv_dtype: how they are stored, one of `dit.cache.storage.KV_DTYPES`.
    """

    def __init__(
        self,
        plan: CachePlan,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str | None,
        kv_dtype: str,
    ) -> None:
        self.plan, self.kv_dtype = plan, kv_dtype
        batch, heads, width = shape
        self.workspace = torch.empty(
            2, batch, heads, plan.max_context(), width, dtype=dtype, device=device
        )  # (2,B,K,M,E)
        self.kept: list[StoredTokens | None] = [None] * plan.num_layers
        self.joined = 0  # tokens in the workspace

    @property
    def lengths(self) -> list[int]:
        """Tokens that each layer holds."""
        return [0 if one is None else one.length for one in self.kept]

    @property
    def token_nbytes(self) -> int:
        """Bytes of a stored token: keys and values, all rows and heads."""
        _, batch, heads, _, width = self.workspace.shape
        return batch * heads * token_nbytes(width, self.workspace.dtype, self.kv_dtype)

    @property
    def segment_nbytes(self) -> int:
        """Bytes that a scale takes in a layer beside its tokens, all rows and heads."""
        _, batch, heads, _, width = self.workspace.shape
        return batch * heads * segment_nbytes(width, self.kv_dtype)

    def layer_nbytes(self, layer: int) -> int:
        """Return bytes of what a layer holds."""
        held = self.kept[layer]
        return 0 if held is None else held.nbytes

    def planned_nbytes(self, plan: CachePlan) -> int:
        """Return the most bytes that a plan stores between two scales."""
        scales = len(plan.capacities)
        tokens = (sum(row) * self.token_nbytes for row in plan.capacities)
        segments = (scale * plan.num_layers * self.segment_nbytes for scale in range(scales))
        return max(a + b for a, b in zip(tokens, segments, strict=True))

    @property
    def peak_nbytes(self) -> int:
        """Bytes of the workspace and of what the layers hold at most, one of them while it evicts."""
        if self.kv_dtype == "auto":
            return self.workspace.nbytes + self.plan.max_stored() * self.token_nbytes
        most, last = 0, len(self.plan.capacities) - 1
        for scale in range(last + 1):
            held, count = list(self.plan.capacities[scale]), self.plan.token_counts[scale]
            kept = self.plan.capacities[scale + 1] if scale < last else held
            for layer, old in enumerate(held):
                # the old and the new tokens and both joined; then what is joined and what stays of it
                row = old + count
                own = old if scale == last else max(2 * row, row + (kept[layer] if kept[layer] < row else 0))
                most = max(most, (sum(held) - old + own) * self.token_nbytes + self._segments_nbytes(scale, layer))
                held[layer] = kept[layer]
        return self.workspace.nbytes + most

    def _segments_nbytes(self, scale: int, layer: int) -> int:
        """Return bytes of all segments while a layer joins those of a scale: its old ones twice, the new one twice."""
        segments = scale * self.plan.num_layers + layer
        return (segments + (scale + 2 if scale < len(self.plan.capacities) - 1 else 0)) * self.segment_nbytes

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Join a layer's history and new tokens (B, N, K, E) in the workspace; returns the row, (B, M, K, E) views."""
        past, held = self.lengths[layer], self.kept[layer]
        self.joined = past + key.shape[1]
        keys, values = self.workspace[0], self.workspace[1]  # (B, K, M', E) each
        if held is not None:
            held.write_into(keys[:, :, :past], values[:, :, :past])
        keys[:, :, past : self.joined] = key.transpose(1, 2)  # (B, K, N, E)
        values[:, :, past : self.joined] = value.transpose(1, 2)  # (B, K, N, E)
        if self.kv_dtype == "auto":
            self.kept[layer] = None  # it is in the workspace now
        return keys[:, :, : self.joined].transpose(1, 2), values[:, :, : self.joined].transpose(1, 2)  # (B, M, K, E)

    def evict(self, layer: int, scale: int, query: Tensor, grid: Grid | None) -> None:
        """Store what the plan keeps of the row in the workspace for the next scale; nothing after the last."""
        held, self.kept[layer] = self.kept[layer], None
        if scale == len(self.plan.token_counts) - 1:
            return
        keys, values = (part[:, :, : self.joined] for part in self.workspace)  # (B, K, M, E) each
        capacity = self.plan.capacities[scale + 1][layer]
        is_exact = self.kv_dtype == "auto"
        tokens = ExactTokens(keys, values) if is_exact else _in_8_bits(held, keys, values)
        del held
        if capacity < self.joined:
            index = select_tokens(self.plan, query.transpose(1, 2), keys, capacity, grid)  # (B, K, c)
            self.kept[layer] = tokens.gathered(index)
        else:  # the workspace goes on to the next layer
            self.kept[layer] = tokens.cloned() if isinstance(tokens, ExactTokens) else tokens

    def load(self, layer: int, other: StackedBuffers | PackedBuffers) -> None:
        """Take over a layer's tokens from another cache; those in 8 bits as they are."""
        held = other.kept[layer] if isinstance(other, PackedBuffers) else None
        if held is not None and isinstance(held, Int8Tokens) == (self.kv_dtype == "int8"):
            self.kept[layer] = held
        else:
            keys, values = other.stored(layer)  # (B, K, T, E) each
            self.kept[layer] = (
                ExactTokens(keys, values).cloned() if self.kv_dtype == "auto" else Int8Tokens.of(keys, values)
            )

    def stored(self, layer: int) -> KeyValue:
        """Return the keys and values of a layer, dequantized, (B, K, T, E) each."""
        held = self.kept[layer]
        if held is None:
            empty = self.workspace[0][:, :, :0]
            return empty, empty
        _, batch, heads, _, width = self.workspace.shape
        keys, values = self.workspace.new_empty(2, batch, heads, held.length, width)
        held.write_into(keys, values)
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Choose rows by indices (B',)."""
        if len(rows) != self.workspace.shape[1]:
            self.workspace = self.workspace.new_empty(2, len(rows), *self.workspace.shape[2:])
        self.kept = [None if one is None else one.selected(rows) for one in self.kept]

    def reset(self) -> None:
        """Forget everything."""
        self.kept = [None] * self.plan.num_layers
        self.joined = 0


def _in_8_bits(held: StoredTokens | None, keys: Tensor, values: Tensor) -> Int8Tokens:
    """Return the tokens that are held, as they are, and the further ones of a row (B, K, M, E) in 8 bits."""
    past = 0 if held is None else held.length
    new = Int8Tokens.of(keys[:, :, past:], values[:, :, past:])
    return held.joined(new) if isinstance(held, Int8Tokens) else new
