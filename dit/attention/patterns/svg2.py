"""Sparse VideoGen 2: queries and keys of each head in clusters of alike ones, which are the blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit.attention.block_map import BlockMap, make_block_map
from dit.attention.grid import TokenGrid
from dit.attention.layout import cluster_layout
from dit.attention.patterns import register_pattern
from dit.attention.patterns.scores import score_means
from dit.attention.patterns.selection import budget, choose_mass, softmax_known

DISTANCES_AT_ONCE = 2**24
"""Most distances between tokens and centroids that are held at a time."""


@dataclass
class ClusterState:
    """Centroids of a layer and branch, from which the next step starts; `svg2` fills it.

    Args:
        query: (B, K, C, E), float32.
        key: (B, K, C', E), float32.
    """

    query: Tensor | None = None
    key: Tensor | None = None


@register_pattern("svg2", paper="arXiv 2505.18875", online=True)
@torch.no_grad()
def svg2(
    grid: TokenGrid,
    query: Tensor,
    key: Tensor,
    p: float = 0.9,
    *,
    query_clusters: int | None = None,
    key_clusters: int | None = None,
    least: float = 0.1,
    iterations: int = 50,
    warm_iterations: int = 2,
    state: ClusterState | None = None,
    block: int = 128,
) -> BlockMap:
    """Let each cluster of queries see the best clusters of keys until they hold a share of the mass between means.

    Visual tokens are put in order of their cluster, a clustering for each sample and head (semantic-aware permutation
    of Sparse VideoGen 2, arXiv 2505.18875); each cluster is a block, of whatever size. The mass of a cluster of keys is
    its size times the exponential of its mean's score. Clusters start at tokens spread over the grid, where the authors
    draw them; a cluster that loses all its tokens keeps its centroid.

    Args:
        grid: the tokens.
        query: (B, N, K, E), in the order of the sequence.
        key: likewise.
        p: share of the mass; with the cluster with which the sum passes it.
        query_clusters: C; None means one for 256 tokens. Never more than visual tokens.
        key_clusters: C'; None means one for 128 tokens. The authors take 300 and 1000 for 30,000 to 120,000 tokens.
        least: share of the clusters of keys that are visited at least, rounded down (`min_kc_ratio`).
        iterations: of k-means without a state.
        warm_iterations: of k-means that starts from a state.
        state: where to start, and where to leave the centroids; they are those of one layer and branch. One of another
            shape isn't used.
        block: tokens of a block of exact ones.

    Raises:
        ValueError: fewer than one cluster or iteration.
    """
    visual = slice(grid.visual_start, grid.visual_start + grid.visual_length)
    state = ClusterState() if state is None else state
    clusters, means = [], []
    for x, count, tokens, name in ((query, query_clusters, 256, "query"), (key, key_clusters, 128, "key")):
        count = max(grid.visual_length // tokens, 1) if count is None else min(count, grid.visual_length)
        if min(count, iterations, warm_iterations) < 1:
            raise ValueError(
                f"clusters and iterations must be at least 1, got {count}, {iterations} and {warm_iterations}"
            )
        points = x[:, visual].transpose(1, 2).float()  # (B, K, V, E)
        start: Tensor | None = getattr(state, name)
        if start is None or start.shape != (*points.shape[:2], count, points.shape[-1]):
            spread = torch.arange(count, device=x.device) * grid.visual_length // count  # (C,)
            labels, mean, kept = cluster(points, points[:, :, spread], iterations)
        else:
            labels, mean, kept = cluster(points, start, warm_iterations)
        setattr(state, name, kept)
        clusters.append(cluster_layout(grid, labels, count, exact_block=block))
        means.append(mean)
    queries, keys = clusters
    sizes = keys.sizes[..., : keys.visual_count].float()  # (B, K, C')
    scores = score_means(means[0], means[1], sizes, query.shape[-1] ** -0.5)  # (B, K, C, C')
    mass = softmax_known(scores + sizes.log()[..., None, :])
    visits = choose_mass(mass, p, least=budget(keys.visual_count, least, "floor"))
    return make_block_map(queries, visits, keys=keys)


def cluster(points: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster points by k-means in Euclidean distance, each sample and head by itself.

    Args:
        points: (B, K, V, E), float32.
        start: (B, K, C, E), where the centroids begin.
        iterations: how often points are assigned to the nearest centroid, and centroids moved to the mean.

    Returns:
        The cluster of each point (B, K, V); the mean of each cluster (B, K, C, E), where it began if it is empty; and
        the same with the last finite centroid for those that aren't, to start from again.
    """
    batch, heads, count, width = start.shape
    flat, centroids = points.flatten(0, 1), start.float().flatten(0, 1)  # (G, V, E), (G, C, E)
    group = torch.arange(len(flat), device=points.device)[:, None] * count  # (G, 1)
    labels, means = group, centroids
    for _ in range(iterations):
        labels = _nearest(flat, centroids)  # (G, V)
        index = (labels + group).flatten()
        sums = torch.zeros_like(centroids).flatten(0, 1).index_add_(0, index, flat.flatten(0, 1))  # (G C, E)
        sizes = torch.bincount(index, minlength=len(sums))[:, None]  # (G C, 1)
        means = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids.flatten(0, 1)).view_as(centroids)
        moved = torch.where(means.isfinite().all(-1, keepdim=True), means, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    shape = (batch, heads, count, width)
    return labels.view(batch, heads, -1), means.view(shape), centroids.view(shape)


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid of each point: (G, V, E) and (G, C, E) to (G, V)."""
    norms = centroids.square().sum(-1)[:, None]  # (G, 1, C)
    step = max(DISTANCES_AT_ONCE // (len(points) * centroids.shape[1]), 1)
    nearest = [torch.baddbmm(norms, some, centroids.mT, alpha=-2).argmin(-1) for some in points.split(step, dim=1)]
    return torch.cat(nearest, dim=1)
