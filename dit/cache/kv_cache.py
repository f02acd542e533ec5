"""The keys and values of the scales painted so far, in buffers whose size is known before the first of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POLICIES = ("full",)
"""What can be kept; "full" keeps everything that a later scale reads, so it changes no number."""


class ScaleKVCache:
    """Keys and values of all layers of one network, for a batch of pictures that are painted together.

    The last scale is never stored: nothing reads it later. Its queries do need a row of keys in which history and
    current scale are neighbours, and copying the history for that would cost as much as storing. Hence the order in
    memory: tokens come first, and the layers stand in reverse, the last layer at the front,

        | layer 2: history | layer 1: history | layer 0: history | room |

    so the last scale of a layer is written behind its history, over the histories of the layers before it, which have
    done their work by then. Only layer 0 needs room of its own.

    Args:
        token_counts: tokens of each scale, coarse to fine.
        num_layers: layers that cache.
        batch_size: rows B; with guidance both branches count.
        num_heads: heads K.
        head_dim: head width E.
        dtype: of keys and values, as the network makes them.
        device: where the buffers live.
        policy: one of `POLICIES`.

    Attributes:
        policy: what is kept.

    Raises:
        ValueError: an unknown policy, or sizes below 1.
    """

    def __init__(
        self,
        token_counts: Sequence[int],
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        policy: str = "full",
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is not known; use one of {', '.join(map(repr, POLICIES))}")
        sizes = {"scales": len(token_counts), "layers": num_layers, "rows": batch_size, "heads": num_heads}
        for name, size in {**sizes, "head_dim": head_dim, "tokens of a scale": min(token_counts, default=0)}.items():
            if size < 1:
                raise ValueError(f"a cache with {size} {name} can hold nothing; use at least 1")
        self.policy = policy
        self.token_counts = tuple(token_counts)
        self.num_layers = num_layers
        self._history = sum(self.token_counts[:-1])
        slots = num_layers * self._history + self.token_counts[-1]
        self._keys = torch.empty(slots, batch_size, num_heads, head_dim, dtype=dtype, device=device)  # (T, B, K, E)
        self._values = torch.empty_like(self._keys)  # (T, B, K, E)
        self._done = [0] * num_layers  # scales seen by each layer

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self._keys.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Number format of what is stored."""
        return self._keys.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that later scales will read."""
        tokens = sum(self.length(layer) for layer in range(self.num_layers))
        return 2 * tokens * self._keys[0].numel() * self._keys.element_size()

    @property
    def peak_nbytes(self) -> int:
        """Bytes that the buffers take from the first scale to the last, the room of the last scale included."""
        return self._keys.nbytes + self._values.nbytes

    def length(self, layer: int) -> int:
        """Stored tokens of a layer; none once its last scale is over."""
        done = self._done[layer]
        return 0 if done == len(self.token_counts) else sum(self.token_counts[:done])

    def append(self, layer: int, scale: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values of the current scale.

        Args:
            layer: index of the layer; the last scale must visit the layers in order.
            scale: index of the scale; each layer must see every scale once, in order.
            key: (B, N, K, E), final (normalised, turned).
            value: (B, N, K, E).

        Returns:
            Keys and values of all scales up to this one, (B, M, K, E) each: views, valid until the next layer's call.

        Raises:
            ValueError: a scale or layer out of order, or tensors of another size.
        """
        self._check(layer, scale, key)
        start = (self.num_layers - 1 - layer) * self._history
        past = sum(self.token_counts[:scale])
        end = start + past + self.token_counts[scale]
        self._keys[start + past : end] = key.transpose(0, 1)  # (N, B, K, E)
        self._values[start + past : end] = value.transpose(0, 1)  # (N, B, K, E)
        self._done[layer] = scale + 1
        return self._keys[start:end].transpose(0, 1), self._values[start:end].transpose(0, 1)  # (B, M, K, E)

    def select(self, rows: Tensor) -> None:
        """Keep, drop, repeat or reorder rows of the batch, for example the survivors of a search.

        Args:
            rows: indices into the batch, (B',), int64.

        Raises:
            ValueError: no rows.
        """
        if rows.numel() == 0:
            raise ValueError("select got no rows; a cache needs at least one")
        rows = rows.to(self._keys.device)
        self._keys, self._values = self._keys.index_select(1, rows), self._values.index_select(1, rows)

    def reset(self) -> None:
        """Forget everything, keep the buffers: ready for the next pictures."""
        self._done = [0] * self.num_layers

    def _check(self, layer: int, scale: int, key: Tensor) -> None:
        """Raise where a call would silently read or write a wrong place."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} is not cached; expected 0 to {self.num_layers - 1}")
        if scale != self._done[layer] or scale >= len(self.token_counts):
            raise ValueError(
                f"layer {layer} has seen {self._done[layer]} of {len(self.token_counts)} scales and got scale {scale}; "
                "run the scales in order, and reset() before the next pictures"
            )
        is_last = scale == len(self.token_counts) - 1
        if is_last and any(done <= scale for done in self._done[:layer]):
            raise ValueError(f"layer {layer} met the last scale before an earlier layer; run the layers in order")
        expected = (self.batch_size, self.token_counts[scale], *self._keys.shape[2:])
        if key.shape != expected:
            raise ValueError(f"keys of scale {scale} have shape {tuple(key.shape)}, expected (B, N, K, E) {expected}")
