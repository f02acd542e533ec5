"""Blocks that aren't visited stay in the softmax, each as one term of its mean key and value (Sol-Attn).

A visited block j contributes sum_k e^{s_ik} v_k, one that isn't e^{s_ij} n_j v_j, where s_ij is the score of its mean
key, v_j its mean value and n_j the number of its tokens (arXiv 2607.24027; NVlabs/Sana, sol_attn/triton_ref). Where a
map's rule leaves out pairs within a visited block, they are not replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.corrections.contract import Correction, CorrectionCall, by_query, query_blocks, register_correction
from dit.attention.functional import merge_attention
from dit.attention.kernels.contract import Tail
from dit.attention.layout import Layout


@register_correction
@dataclass(frozen=True)
class PooledTail(Correction):
    """Keep blocks that aren't visited in the softmax, as one pooled term each (Sol-Attn).

    Args:
        mode: whose score a pooled key gets. "row": each query's own, as Sol-Attn. "centroid": that of the mean of the
            block of queries, as comfy-kitchen: cheaper by the size of a block, and a little less exact. Scores are
            taken from the mean of the pooled keys then, of which each query adds its own.
    """

    mode: Literal["row", "centroid"] = "row"
    name: ClassVar[str] = "pooled_tail"
    paper: ClassVar[str] = "arXiv 2607.24027"

    def __post_init__(self) -> None:
        if self.mode not in ("row", "centroid"):
            raise ValueError(f"mode is {self.mode!r}; use 'row' or 'centroid'")

    def __call__(self, call: CorrectionCall) -> Tensor:
        """Return the corrected output."""
        tail = pooled_tail(call.key, call.value, call.block_map, call.key_mask)
        if self.mode == "row":
            return call.sparse(tail=tail)[0]
        out, lse = call.sparse(return_lse=True)
        if lse is None:
            raise ValueError("the sparse call returned no LSE though it was asked for one")
        return merge_attention([out, (part := centroid_tail(call, tail))[0]], [lse, part[1]])[0]


def pooled_tail(key: Tensor, value: Tensor, block_map: BlockMap, key_mask: Tensor | None = None) -> Tail:
    """Pool keys and values over the blocks of a map.

    Args:
        key: (B, M, K, E).
        value: (B, M, K, E).
        block_map: whose key layout says the blocks. Exact ones are always visited: nothing stands for them.
        key_mask: bool, (B, M), False for keys that the means leave out.

    Returns:
        Means in the dtype of key and value, summed in float32.
    """
    keys = block_map.keys
    mean_key, count = block_means(key, keys, key_mask)  # (B, K, m, E), (B', K', m)
    mean_value, _ = block_means(value, keys, key_mask)
    log_count = count.log()  # -inf for empty blocks
    log_count[..., keys.visual_count :] = -torch.inf
    return Tail(mean_key.to(key.dtype), mean_value.to(value.dtype), log_count)


def block_means(x: Tensor, layout: Layout, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean of each block in float32, 0 for one without tokens, and how many tokens it is of.

    Args:
        x: (B, N, K, E), in the order of the sequence.
        layout: the blocks.
        mask: bool, (B, N), False for tokens that don't count.

    Returns:
        (B, K, n, E) and (B', K', n), both float32.
    """
    batch, length, heads, width = x.shape
    blocks = layout.block_of().to(x.device)  # (B', K', N)
    weight = x.new_ones(1, 1, length, dtype=torch.float32) if mask is None else mask[:, None].float()  # (B or 1, 1, N)
    groups = torch.broadcast_shapes(blocks.shape[:2], weight.shape[:2])
    count = x.new_zeros(*groups, layout.count, dtype=torch.float32)
    count.scatter_add_(2, blocks.expand(*groups, -1), weight.expand(*groups, -1).contiguous())  # (B', K', n)
    values = x.float() if mask is None else x.float().masked_fill(~mask[..., None, None], 0)  # (B, N, K, E)
    if layout.is_shared:
        total = values.new_zeros(batch, layout.count, heads, width).index_add_(1, blocks[0, 0], values)
        total = total.transpose(1, 2)  # (B, K, n, E)
    else:
        index = blocks[..., None].expand(batch, heads, -1, width)
        total = values.new_zeros(batch, heads, layout.count, width)
        total = total.scatter_add(2, index, values.transpose(1, 2))  # (B, K, n, E)
    return total / count.clamp(min=1)[..., None], count


def centroid_tail(call: CorrectionCall, tail: Tail) -> tuple[Tensor, Tensor]:
    """Attend to the pooled keys of blocks that aren't visited, one score for each block of queries.

    A query q of a block with the mean Q gives pooled key k the score Q (k - c) + q c, where c is the mean of the pooled
    keys: what all keys share is scored exactly (comfy-kitchen, backends/eager/sol_attn.py).

    Returns:
        Output (B, N, K, E) and LSE (B, K, N), of the pooled terms alone.
    """
    key, value, log_count = tail.key.float(), tail.value.float(), tail.log_count  # (B, K, m, E), (B', K', m)
    alive = ~log_count.isneginf()  # (B', K', m)
    center = (key * alive[..., None]).sum(2, keepdim=True) / alive.sum(-1).clamp(min=1)[..., None, None]  # (B,K,1,E)
    query, _ = block_means(call.query, call.block_map.queries)  # (B, K, n, E)
    scores = query @ (key - center).mT * call.scale + log_count[..., None, :]  # (B, K, n, m)
    scores = scores.masked_fill(call.block_map.visits, -torch.inf)
    lse = scores.logsumexp(-1)  # (B, K, n)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()  # (B, K, n, m)
    blocks = query_blocks(call)  # (B', K', N)
    out = by_query(weights @ value, blocks).transpose(1, 2)  # (B, N, K, E)
    shift = (call.query.float().transpose(1, 2) @ center.mT)[..., 0] * call.scale  # (B, K, N)
    return out.to(call.query.dtype), by_query(lse, blocks) + shift
