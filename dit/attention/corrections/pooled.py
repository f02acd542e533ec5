"""Blocks that aren't visited stay in the softmax, each as one term of its mean key and value (Sol-Attn).

A visited block j contributes sum_k e^{s_ik} v_k, one that isn't e^{s_ij} n_j v_j, where s_ij is the score of its mean
key, v_j its mean value and n_j the number of its tokens (arXiv 2607.24027; NVlabs/Sana, sol_attn/triton_ref). Where a
map's rule leaves out pairs within a visited block, they are not replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit.attention.block_map import BlockMap
from dit.attention.corrections.blocks import by_query
from dit.attention.corrections.contract import Correction, CorrectionCall, register_correction
from dit.attention.functional import merge_attention
from dit.attention.kernels.contract import Tail
from dit.attention.patterns.scores import block_means


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
    work: ClassVar[float] = 12.0

    def __post_init__(self) -> None:
        if self.mode not in ("row", "centroid"):
            raise ValueError(f"mode is {self.mode!r}; use 'row' or 'centroid'")

    def extra_density(self, density: float, block: int) -> float:
        """Return the share of pairs with pooled keys, one for each block that isn't visited."""
        return (1 - density) / block

    def __call__(self, call: CorrectionCall) -> Tensor:
        """Return the corrected output."""
        tail = pooled_tail(call.key, call.value, call.block_map, call.key_mask)
        if self.mode == "row":
            return call.sparse(tail=tail)[0]
        out, lse = call.sparse(return_lse=True)
        if lse is None:
            raise ValueError("the sparse call returned no LSE though it was asked for one")
        pooled, pooled_lse = centroid_tail(call, tail)
        return merge_attention([out, pooled], [lse, pooled_lse])[0]


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
    keys, exact = block_map.keys, block_map.keys.exact_blocks
    mean_key, count = block_means(key, keys, key_mask)  # (B, K, m - exact, E), (B', K', m - exact)
    mean_value, _ = block_means(value, keys, key_mask)
    mean_key, mean_value = (F.pad(x, (0, 0, 0, exact)) for x in (mean_key, mean_value))  # (B, K, m, E)
    log_count = F.pad(count.log(), (0, exact), value=-torch.inf)  # (B', K', m), -inf for empty blocks too
    return Tail(mean_key.to(key.dtype), mean_value.to(value.dtype), log_count)


def pooled_scores(call: CorrectionCall) -> Tensor:
    """Return the scores of the pooled keys that stand for blocks a query's block doesn't visit, (B, K, N, m).

    Those of other blocks are -inf; the logarithm of how many tokens a block stands for is in them.
    """
    tail = pooled_tail(call.key, call.value, call.block_map, call.key_mask)
    scores = call.query.float().transpose(1, 2) @ tail.key.float().mT * call.scale  # (B, K, N, m)
    blocks = call.block_map.queries.block_of().to(scores.device)  # (B', K', N)
    visited = by_query(call.block_map.visits.to(scores.device), blocks)  # (B', K', N, m)
    return (scores + tail.log_count[..., None, :]).masked_fill(visited, -torch.inf)


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
    query, _ = block_means(call.query, call.block_map.queries)  # (B, K, n - exact, E)
    query = F.pad(query, (0, 0, 0, call.block_map.queries.exact_blocks))  # (B, K, n, E); exact ones visit everything
    scores = query @ (key - center).mT * call.scale + log_count[..., None, :]  # (B, K, n, m)
    scores = scores.masked_fill(call.block_map.visits, -torch.inf)
    lse = scores.logsumexp(-1)  # (B, K, n)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()  # (B, K, n, m)
    blocks = call.block_map.queries.block_of().to(lse.device)  # (B', K', N)
    out = by_query(weights @ value, blocks).transpose(1, 2)  # (B, N, K, E)
    shift = (call.query.float().transpose(1, 2) @ center.mT)[..., 0] * call.scale  # (B, K, N)
    return out.to(call.query.dtype), by_query(lse, blocks) + shift
