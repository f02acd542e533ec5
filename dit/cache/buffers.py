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
from dit.cache.storage import Stored, dequantize_into, quantize, token_nbytes
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
        self.kept: list[tuple[Stored, Stored] | None] = [None] * plan.num_layers
        self.joined = 0  # tokens in the workspace

    @property
    def lengths(self) -> list[int]:
        """Tokens that each layer holds."""
        return [0 if pair is None else pair[0][0].shape[2] for pair in self.kept]

    @property
    def token_nbytes(self) -> int:
        """Bytes of a stored token: keys and values, all rows and heads."""
        _, batch, heads, _, width = self.workspace.shape
        return 2 * batch * heads * token_nbytes(width, self.workspace.dtype, self.kv_dtype)

    @property
    def peak_nbytes(self) -> int:
        """Bytes of the workspace and of what the layers hold at most."""
        return self.workspace.nbytes + self.plan.max_stored() * self.token_nbytes

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Join a layer's history and new tokens (B, N, K, E) in the workspace; returns the row, (B, M, K, E) views."""
        past, held = self.lengths[layer], self.kept[layer]
        self.joined = past + key.shape[1]
        # dequantize the history into the workspace, append the new tokens
        for part, new, old in zip(self.workspace, (key, value), held or (None, None), strict=True):
            if old is not None:
                dequantize_into(old, part[:, :, :past])
            part[:, :, past : self.joined] = new.transpose(1, 2)  # (B, K, N, E)
        self.kept[layer] = None  # it is in the workspace now
        keys, values = (part[:, :, : self.joined].transpose(1, 2) for part in self.workspace)  # (B, M, K, E) each
        return keys, values

    def evict(self, layer: int, scale: int, query: Tensor, grid: Grid | None) -> None:
        """Store what the plan keeps of the row in the workspace for the next scale; nothing after the last."""
        if scale == len(self.plan.token_counts) - 1:
            return
        keys, values = (part[:, :, : self.joined] for part in self.workspace)  # (B, K, M, E) each
        capacity = self.plan.capacities[scale + 1][layer]
        # select the tokens that stay
        if capacity < self.joined:
            kept_indices = select_tokens(self.plan, query.transpose(1, 2), keys, capacity, grid)  # (B, K, c)
            index = kept_indices[..., None].expand(-1, -1, -1, keys.shape[-1])  # (B, K, c, E)
            keys, values = keys.gather(2, index), values.gather(2, index)  # (B, K, c, E)
        elif self.kv_dtype == "auto":
            keys, values = keys.clone(), values.clone()  # the workspace goes on to the next layer
        # store them, quantized if asked
        self.kept[layer] = (quantize(keys, self.kv_dtype), quantize(values, self.kv_dtype))

    def load(self, layer: int, pair: KeyValue) -> None:
        """Take over a layer's tokens (B, K, T, E) from another cache."""
        self.kept[layer] = (quantize(pair[0].clone(), self.kv_dtype), quantize(pair[1].clone(), self.kv_dtype))

    def stored(self, layer: int) -> KeyValue:
        """Return the keys and values of a layer, dequantized, (B, K, T, E) each."""
        pair = self.kept[layer]
        if pair is None:
            empty = self.workspace[0][:, :, :0]
            return empty, empty
        out = [torch.empty(one[0].shape, dtype=self.workspace.dtype, device=self.workspace.device) for one in pair]
        for one, part in zip(pair, out, strict=True):
            dequantize_into(one, part)
        return out[0], out[1]

    def select(self, rows: Tensor) -> None:
        """Choose rows by indices (B',)."""
        if len(rows) != self.workspace.shape[1]:
            self.workspace = self.workspace.new_empty(2, len(rows), *self.workspace.shape[2:])
        for layer, pair in enumerate(self.kept):
            if pair is not None:
                key, value = (tuple(part.index_select(0, rows) for part in one) for one in pair)
                self.kept[layer] = (key, value)

    def reset(self) -> None:
        """Forget everything."""
        self.kept = [None] * self.plan.num_layers
        self.joined = 0
