"""KV cache of the scales generated so far, in buffers whose size is known before the first scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dit.cache.buffers import Attend, PackedBuffers, StackedBuffers
from dit.cache.plan import CachePlan, check_policy, plan_cache
from dit.cache.storage import check_kv_dtype
from dit.layers.scales import Grid

Observer = Callable[[int, int, Tensor, Tensor, Tensor], None]
"""Called with layer, scale, queries (B, N, K, E), keys and values (B, M, K, E) of each attention call."""


@dataclass(frozen=True)
class KVReport:
    """What a cache kept and what it took.

    Args:
        policy: what was kept.
        share: tokens kept for the last scale over the full history, the mean over layers.
        kv_dtype: how they were stored.
        rows: rows of the batch at the end; with guidance both branches.
        stored_bytes: most bytes that were stored between two scales.
        peak_bytes: the same with the workspace.
        full_bytes: what the full history of as many rows takes in the model's number format.
    """

    policy: str
    share: float
    kv_dtype: str
    rows: int
    stored_bytes: int
    peak_bytes: int
    full_bytes: int

    def as_dict(self) -> dict[str, object]:
        """Return plain values."""
        return asdict(self)


class ScaleKVCache:
    """Keys and values of all layers of one network, for a batch of images that are generated together.

    The last scale is never stored: nothing reads it later. A network calls `append` before and `evict` after the
    attention of each layer; in between, the returned row is valid. Where everything is kept, `evict` has nothing to
    do and may be left out.

    Args:
        token_counts: tokens of each scale, coarse to fine.
        num_layers: layers that cache.
        batch_size: rows B; with guidance both branches count.
        num_heads: heads K.
        head_dim: head width E.
        dtype: of keys and values, as the network makes them.
        device: where the buffers live.
        policy: one of `POLICIES`; "scalekv" needs a plan.
        budget: fraction of the full history to keep, see `plan_cache`; "full" ignores it.
        plan: what to keep, instead of policy and budget.
        kv_dtype: how to store, "auto" (as the network makes it) or "int8".
        grids: rows and columns of each scale; without them observing queries are spread along the row of tokens.
        observer: sees every attention call, for calibration.

    Attributes:
        plan: what is kept.
        kv_dtype: how it is stored.

    Raises:
        ValueError: an unknown policy or format, a budget out of range, a plan for another schedule or depth, or sizes
            below 1.
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
        budget: float = 0.1,
        plan: CachePlan | None = None,
        kv_dtype: str = "auto",
        grids: Sequence[Grid] | None = None,
        observer: Observer | None = None,
    ) -> None:
        check_policy(policy)
        check_kv_dtype(kv_dtype)
        sizes = {"scales": len(token_counts), "layers": num_layers, "rows": batch_size, "heads": num_heads}
        for name, size in {**sizes, "head_dim": head_dim, "tokens of a scale": min(token_counts, default=0)}.items():
            if size < 1:
                raise ValueError(f"a cache with {size} {name} can hold nothing; use at least 1")
        self.token_counts = tuple(token_counts)
        self.num_layers = num_layers
        self.kv_dtype = kv_dtype
        self.plan = self._checked(plan or plan_cache(policy, self.token_counts, num_layers, budget))
        self._shape, self._dtype, self._device = (batch_size, num_heads, head_dim), dtype, device
        self._grids, self._observer = grids, observer
        self._done = [0] * num_layers  # scales seen by each layer
        self._pending: int | None = None  # the layer whose row is in use
        self._most_stored = 0
        if self.plan.policy == "full" and kv_dtype == "auto":
            self._buffers: StackedBuffers | PackedBuffers = StackedBuffers(
                self.token_counts, num_layers, self._shape, dtype, device
            )
        else:
            self._buffers = PackedBuffers(self.plan, self._shape, dtype, device, kv_dtype)

    @property
    def policy(self) -> str:
        """What is kept."""
        return self.plan.policy

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return self._shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the keys and values that come in and go out."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that later scales will read."""
        held = (layer for layer in range(self.num_layers) if self.length(layer))
        return sum(self._buffers.layer_nbytes(layer) for layer in held)

    @property
    def planned_nbytes(self) -> int:
        """Most bytes that will be stored between two scales, if no token is pruned."""
        return self._buffers.planned_nbytes(self.plan)

    @property
    def peak_nbytes(self) -> int:
        """Most bytes from the first scale to the last, the room of the last scale included."""
        return self._buffers.peak_nbytes

    def length(self, layer: int) -> int:
        """Return stored tokens of a layer; none once its last scale is over."""
        return 0 if self._done[layer] == len(self.token_counts) else self._buffers.lengths[layer]

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values that a layer holds, (B, K, T, E) each; for looking, not for writing."""
        return self._buffers.stored(layer)

    def report(self) -> KVReport:
        """Say what was kept so far and what it took."""
        batch, heads, width = self._shape
        token = 2 * batch * heads * width * self._dtype.itemsize
        return KVReport(
            policy=self.policy,
            share=self.plan.share,
            kv_dtype=self.kv_dtype,
            rows=batch,
            stored_bytes=self._most_stored,
            peak_bytes=self.peak_nbytes,
            full_bytes=token * self.num_layers * sum(self.token_counts[:-1]),
        )

    def append(self, layer: int, scale: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values of the current scale.

        Args:
            layer: index of the layer; the last scale must visit the layers in order.
            scale: index of the scale; each layer must see every scale once, in order.
            key: (B, N, K, E), final (normalised, turned); N may be less than the scale's tokens if some were pruned.
            value: (B, N, K, E).

        Returns:
            Keys and values of what is kept of all scales up to this one, (B, M, K, E) each: valid until the next
            layer's call.

        Raises:
            ValueError: a scale or layer out of order, or tensors of another size.
        """
        self._check(layer, scale, key)
        self._done[layer] = scale + 1
        self._pending = layer
        return self._buffers.append(layer, key, value)  # (B, M, K, E) each

    def attend(self, layer: int, scale: int, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
        """Add a layer's keys and values of the current scale, attend to all that is kept, and settle.

        The same as `append`, `attend` and `evict`, except that it needs less memory at the last scale of
        the first layer.

        Args:
            layer: see `append`.
            scale: see `append`.
            query: (B, N, K, E), final.
            key: see `append`.
            value: see `append`.
            attend: attention, on any number of heads.

        Returns:
            (B, N, K, E).
        """
        buffers = self._buffers
        if (
            isinstance(buffers, StackedBuffers)
            and self._observer is None
            and not buffers.has_space(layer, key.shape[1])
        ):
            self._check(layer, scale, key)
            self._done[layer] = scale + 1
            return buffers.attend_by_head(layer, query, key, value, attend)  # (B, N, K, E)
        keys, values = self.append(layer, scale, key, value)  # (B, M, K, E) each
        out = attend(query, keys, values)  # (B, N, K, E)
        self.evict(layer, query, keys, values)
        return out

    def evict(self, layer: int, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Decide what stays of a layer's row, after its attention.

        Args:
            layer: of the last `append`.
            query: of the current scale, (B, N, K, E), final.
            keys: that `append` returned, (B, M, K, E).
            values: that `append` returned, (B, M, K, E).

        Raises:
            ValueError: the last `append` was another layer's.
        """
        if self._pending != layer:
            raise ValueError(f"settle got layer {layer} after an append to {self._pending}; call them in pairs")
        scale = self._done[layer] - 1
        if self._observer is not None:
            self._observer(layer, scale, query, keys, values)
        grid = self._grids[scale] if self._grids is not None else None
        self._buffers.evict(layer, scale, query, grid)
        self._pending = None
        if layer == self.num_layers - 1:
            self._most_stored = max(self._most_stored, self.nbytes)

    def compress(self, plan: CachePlan) -> None:
        """Follow another plan from now on: layers shrink as they settle at the current or next scale.

        Args:
            plan: for the same schedule and depth.

        Raises:
            ValueError: a plan for another schedule or depth, or in the midst of a layer.
        """
        if self._pending is not None:
            raise ValueError(f"layer {self._pending} is attending; compress between two scales")
        old = self._buffers
        new = PackedBuffers(self._checked(plan), self._shape, self._dtype, self._device, self.kv_dtype)
        longest = max(old.lengths) + max(self.token_counts)
        if longest > new.workspace.shape[3]:  # what is there now may be longer than what the plan will keep
            new.workspace = new.workspace.new_empty(*new.workspace.shape[:3], longest, new.workspace.shape[4])
        for layer in range(self.num_layers):
            if self.length(layer):
                new.load(layer, old)
        self.plan, self._buffers = plan, new

    def select(self, rows: Tensor) -> None:
        """Keep, drop, repeat or reorder rows of the batch, for example the survivors of a search.

        Args:
            rows: indices into the batch, (B',), int64.

        Raises:
            ValueError: no rows.
        """
        if rows.numel() == 0:
            raise ValueError("select got no rows; a cache needs at least one")
        workspace = self._buffers.keys if isinstance(self._buffers, StackedBuffers) else self._buffers.workspace
        self._buffers.select(rows.to(workspace.device))
        self._shape = (len(rows), *self._shape[1:])

    def reset(self) -> None:
        """Forget everything, keep the buffers: ready for the next images."""
        self._done = [0] * self.num_layers
        self._pending, self._most_stored = None, 0
        self._buffers.reset()

    def _checked(self, plan: CachePlan) -> CachePlan:
        """Raise unless a plan fits."""
        if plan.token_counts != self.token_counts or plan.num_layers != self.num_layers:
            raise ValueError(
                f"the plan is for {plan.num_layers} layers and scales of {plan.token_counts} tokens, the cache for "
                f"{self.num_layers} and {self.token_counts}; make the plan for this network and schedule"
            )
        return plan

    def _check(self, layer: int, scale: int, key: Tensor) -> None:
        """Raise where a call would silently read or write at a wrong position."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer {layer} is not cached; expected 0 to {self.num_layers - 1}")
        if scale != self._done[layer] or scale >= len(self.token_counts):
            raise ValueError(
                f"layer {layer} has seen {self._done[layer]} of {len(self.token_counts)} scales and got scale {scale}; "
                "run the scales in order, and reset() before the next images"
            )
        if self._pending is not None and isinstance(self._buffers, PackedBuffers):
            raise ValueError(f"layer {self._pending} was not settled; call settle() after its attention")
        is_last = scale == len(self.token_counts) - 1
        if is_last and any(done <= scale for done in self._done[:layer]):
            raise ValueError(f"layer {layer} met the last scale before an earlier layer; run the layers in order")
        most = self.token_counts[scale]
        expected = (self.batch_size, most, *self._shape[1:])
        given = (key.shape[0], *key.shape[2:]) if key.ndim == 4 else None
        if given != (self.batch_size, *self._shape[1:]) or not 1 <= key.shape[1] <= most:
            raise ValueError(
                f"keys of scale {scale} have shape {tuple(key.shape)}, expected (B, N, K, E) {expected} or fewer tokens"
            )
