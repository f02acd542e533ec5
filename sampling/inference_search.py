"""Inference-time search: generate several candidates, score them while coarse, continue with the best.

TTS-VAR (arXiv 2507.18537): many candidates through the cheap coarse scales, fewer and fewer through the expensive fine
ones. Early, when structure is fixed but rewards are not reliable, candidates are clustered by appearance and one per
cluster continues; later they are resampled in proportion to exp(strength x reward). Best-of-N generates all to the end,
beam search keeps the best few and branches them.

We select before a scale runs, so a schedule says how many candidates each scale really costs. The released code selects
after it has run: with the same numbers it pays for 14656 tokens of a 1024-pixel image where its schedule says 12800.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.next_scale import ScaleState

Reward = Callable[[Tensor, list[str]], Tensor]
"""From images (B, 3, H, W) in [0, 1] and their prompts to rewards (B,); higher is better."""

Features = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to vectors (B, F): what candidates are clustered by."""

BATCH_SIZES = (8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1, 1)
"""Published candidates at each of 13 scales."""

CLUSTER_SCALES, RESAMPLE_SCALES = (2, 5), (6, 9)
"""Scales of the published schedule before which candidates are clustered, and resampled."""

METHODS = ("tts", "best_of", "beam")
POTENTIALS = ("value", "diff", "max", "sum")
FEATURE_SIDE = 8
"""Side of the small image that stands for a candidate where no features are given."""


@dataclass(frozen=True)
class TTSConfig:
    """How to search.

    Args:
        reward: any callable, see `Reward`; or folder or hub id of a CLIP-like model of transformers, see
            `sampling.rewards`; None is the scorer that comes with the model, if one does.
        method: "tts", "best_of" or "beam".
        batch_sizes: candidates that each scale is run with; None is the published schedule, stretched to the number of
            scales. For "best_of" a single number will do.
        cluster_scales: scales before which candidates are clustered; None follows the published schedule.
        resample_scales: scales before which candidates are resampled (or, with "beam", the best kept and branched).
        potential: what the draw depends on: the reward now ("value"), its gain since the last look ("diff"), the best
            ("max") or the sum of all looks so far.
        replacement: whether a candidate may be drawn more than once, as published; it then branches. Without, those
            that go on are different, which is worth more where coarse scales decide nearly everything.
        strength: lambda, the exponent's factor, for rewards that differ by about 1 as the published ones do; a reward
            may have an attribute `unit`, the difference that counts, and lambda is then for multiples of it.
        beam_width: how many the beam keeps at a selection; they are repeated to fill the next scale's batch.
        features: see `Features`; None is the image itself, very small.

    Raises:
        ValueError: an unknown method or potential, batches that grow (but for "beam") or shrink at a scale where
            nothing is selected.
    """

    reward: Reward | str | None = None
    method: str = "tts"
    batch_sizes: tuple[int, ...] | int | None = None
    cluster_scales: tuple[int, ...] | None = None
    resample_scales: tuple[int, ...] | None = None
    potential: str = "value"
    replacement: bool = True
    strength: float = 10.0
    beam_width: int = 2
    features: Features | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("method", self.method, METHODS), ("potential", self.potential, POTENTIALS)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not known; use one of {', '.join(map(repr, known))}")
        sizes = (self.batch_sizes,) if isinstance(self.batch_sizes, int) else self.batch_sizes or (1,)
        if min(sizes) < 1 or self.beam_width < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes}, beam_width={self.beam_width}; expected at least 1")
        if isinstance(self.batch_sizes, int) and self.method == "tts":
            raise ValueError("method 'tts' wants the candidates of each scale; a single number is for 'best_of'")
        if not self.strength >= 0:
            raise ValueError(f"strength is {self.strength}; expected 0 or more")

    @classmethod
    def for_cost(cls, cost: float, token_counts: Sequence[int], **settings: Any) -> TTSConfig:
        """Scale the published schedule's candidates to a cost in images.

        A cost just below a multiple of the published one goes into more candidates early on, not into more at the end.
        A schedule whose last two scales hold most of its tokens has no room for that: there, candidates are drawn
        without replacement where the first of the two begins and, if there is enough to spend, before the last.

        Args:
            cost: tokens to spend, over those of one image; at least 1.
            token_counts: tokens of each scale.
            **settings: other arguments of the class. With `method="best_of"` N is the whole part of `cost`.

        Raises:
            ValueError: less than one image.
        """
        if cost < 1:
            raise ValueError(f"a cost of {cost} is less than one image; expected at least 1")
        if settings.get("method") == "best_of":
            return cls(batch_sizes=int(cost), **settings)
        if len(token_counts) > 2 and token_counts[-2] > sum(token_counts[:-2]):
            # the last two scales dominate the cost
            sizes = sizes_for_large_last_scales(cost, token_counts)
            drops = tuple(scale for scale in range(1, len(sizes)) if sizes[scale] < sizes[scale - 1])
            steep: dict[str, Any] = {"batch_sizes": sizes, "cluster_scales": (), "resample_scales": drops}
            return cls(**{**steep, "replacement": False, **settings})
        # scale the published schedule until the cost is reached
        pattern = stretch(len(token_counts)).batch_sizes
        fitting = (1,) * len(pattern)
        for whole in (True, False):  # all scales first; what is left then goes to those where candidates are chosen
            for step in range(1, int(1024 * cost)):
                larger = tuple(
                    max(int(size * step / 64), 1) if whole or size > 1 else held
                    for size, held in zip(pattern, fitting, strict=True)
                )
                if token_cost(larger, token_counts) > cost + 1e-3:
                    break
                fitting = larger if sum(larger) > sum(fitting) else fitting
        return cls(batch_sizes=fitting, **settings)

    def at(self, num_scales: int) -> SearchSchedule:
        """Resolve this search for a schedule of scales.

        Raises:
            ValueError: a schedule of another length, or one that cannot be followed.
        """
        if self.method == "best_of":
            count = self.batch_sizes if isinstance(self.batch_sizes, int) else max(self.batch_sizes or BATCH_SIZES)
            return SearchSchedule((count,) * num_scales, frozenset(), frozenset())
        usual = stretch(num_scales)
        sizes = (self.batch_sizes,) * num_scales if isinstance(self.batch_sizes, int) else self.batch_sizes
        sizes = usual.batch_sizes if sizes is None else sizes
        drops = {scale for scale in range(1, len(sizes)) if sizes[scale] < sizes[scale - 1]}
        given = (self.cluster_scales, self.resample_scales)
        if given == (None, None):
            cluster = {scale for scale in drops if scale <= max(usual.cluster, default=0)}
            resample = drops - cluster
        else:
            cluster, resample = (set(scales or ()) for scales in given)
        if self.method == "beam":
            cluster, resample = set(), resample | cluster or set(usual.resample)
        schedule = SearchSchedule(tuple(sizes), frozenset(cluster), frozenset(resample))
        schedule.check(num_scales, may_grow=self.method == "beam")
        return schedule


@dataclass(frozen=True)
class SearchSchedule:
    """Candidates of each scale, and the scales before which they are clustered or resampled."""

    batch_sizes: tuple[int, ...]
    cluster: frozenset[int]
    resample: frozenset[int]

    def check(self, num_scales: int, may_grow: bool = False) -> None:
        """Raise ValueError unless the schedule can be followed."""
        if len(self.batch_sizes) != num_scales:
            raise ValueError(f"batch_sizes has {len(self.batch_sizes)} entries for {num_scales} scales; give one each")
        chosen = self.cluster | self.resample
        if self.cluster & self.resample or not all(0 < scale < num_scales for scale in chosen):
            raise ValueError(
                f"cluster_scales {sorted(self.cluster)} and resample_scales {sorted(self.resample)} must differ and "
                f"lie in 1 to {num_scales - 1}"
            )
        for scale in range(1, num_scales):
            before, after = self.batch_sizes[scale - 1 : scale + 1]
            if after > before and not (may_grow and scale in chosen):
                raise ValueError(f"batch_sizes grows from {before} to {after} at scale {scale}; it may only shrink")
            if after != before and scale not in chosen:
                raise ValueError(
                    f"batch_sizes goes from {before} to {after} at scale {scale}, where nothing is selected: name it "
                    "in cluster_scales or resample_scales"
                )


def stretch(num_scales: int) -> SearchSchedule:
    """Stretch the published schedule to another number of scales."""
    last = len(BATCH_SIZES) - 1
    indices = [round(scale * last / max(num_scales - 1, 1)) for scale in range(num_scales)]
    sizes = tuple(BATCH_SIZES[index] for index in indices)
    cluster, resample = set(), set()
    for scale in range(1, num_scales):
        if sizes[scale] < sizes[scale - 1]:
            crossed = range(indices[scale - 1] + 1, indices[scale] + 1)
            (resample if any(index in crossed for index in RESAMPLE_SCALES) else cluster).add(scale)
    return SearchSchedule(sizes, frozenset(cluster), frozenset(resample))


def sizes_for_large_last_scales(cost: float, token_counts: Sequence[int]) -> tuple[int, ...]:
    """Return candidates of each scale where the last two scales hold most tokens.

    One of every two images that could be paid for is generated to the end, and one more goes through the first of the
    two scales, after which a reward sees nearly the whole image. The rest goes into candidates of the coarse scales.

    Args:
        cost: tokens to spend, over those of one image.
        token_counts: tokens of each scale.
    """
    *coarse, fine, last = token_counts
    ends = max(int(cost) // 2, 1)
    for seen in (ends + 1, ends):
        left = cost * sum(token_counts) - seen * fine - ends * last
        first = int((left + 1e-6) / sum(coarse))
        if first >= seen:
            break
    return (max(first, seen),) * len(coarse) + (seen, ends)


def token_cost(batch_sizes: Sequence[int], token_counts: Sequence[int]) -> float:
    """Return tokens that a search runs, over those of one image."""
    spent = sum(size * count for size, count in zip(batch_sizes, token_counts, strict=True))
    return spent / sum(token_counts)


# -------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Selection:
    """One look at the candidates.

    Attributes:
        scale: the scale that ran next; the number of scales for the final look.
        kind: "cluster", "resample", "beam" or "final".
        images: what was looked at, (B, 3, H, W) in [0, 1].
        rewards: (B,), None where only looks counted.
        survivors: which candidates went on, (B',).
    """

    scale: int
    kind: str
    images: Tensor
    rewards: Tensor | None
    survivors: Tensor


@dataclass
class SearchResult:
    """What a search found for one prompt.

    Attributes:
        prompt: as given to the reward.
        rewards: of the candidates that were generated to the end, best first, (B,).
        images: these candidates, (B, 3, H, W) in [0, 1].
        selections: every look, in order.
        token_cost: tokens spent over those of one image.
    """

    prompt: str
    rewards: Tensor
    images: Tensor
    selections: list[Selection] = field(default_factory=list)
    token_cost: float = 0.0


class ScaleSearch:
    """A search for one prompt: call `select_candidates` ahead of each scale and `finish` after the last.

    Args:
        config: how to search.
        reward: the callable.
        prompt: for the reward.
        num_scales: of the schedule.
        show: latents (B, C, h, w) to images (B, 3, H, W) in [0, 1].
        generator: of the draws.

    Raises:
        ValueError: see `TTSConfig.at`.
    """

    def __init__(
        self,
        config: TTSConfig,
        reward: Reward,
        prompt: str,
        num_scales: int,
        show: Callable[[Tensor], Tensor],
        generator: torch.Generator | None,
    ) -> None:
        self.config, self.reward, self.prompt, self.show = config, reward, prompt, show
        self.schedule = config.at(num_scales)
        self.generator = generator
        self.selections: list[Selection] = []
        self._history = torch.zeros(self.schedule.batch_sizes[0], 0)  # rewards so far, (B, looks)

    def select_candidates(self, state: ScaleState, scale: int) -> None:
        """Select candidates, if the schedule says so ahead of this scale."""
        is_cluster = scale in self.schedule.cluster
        if not is_cluster and scale not in self.schedule.resample:
            return
        # decode what is there
        wanted = self.schedule.batch_sizes[scale]
        images, rewards = self.show(state.latents), None
        # choose rows: medoids of clusters, or by reward
        if is_cluster:
            kind, features = "cluster", self.config.features or downsampled_pixels
            rows = medoids(features(images).float().cpu(), wanted)  # (B',)
        else:
            rewards = self._judge(images)  # (B,)
            kind = "beam" if self.config.method == "beam" else "resample"
            rows = self._branch(rewards, wanted) if kind == "beam" else self._draw(rewards, wanted)  # (B',)
            self._history = torch.cat([self._history, rewards[:, None]], dim=1)  # (B, looks)
        # reorder everything that is kept of the candidates
        self._history = self._history[rows]
        self.selections.append(Selection(scale, kind, images.cpu(), rewards, rows))
        state.select(rows)

    def finish(self, state: ScaleState) -> SearchResult:
        """Judge the finished candidates and put the best first, in the walk too."""
        images = self.show(state.latents)
        rewards = self._judge(images)  # (B,)
        order = rewards.argsort(descending=True, stable=True)  # (B,)
        state.latents = state.latents[order.to(state.latents.device)]
        images = images.cpu()
        self.selections.append(Selection(len(self.schedule.batch_sizes), "final", images, rewards, order))
        return SearchResult(self.prompt, rewards[order], images[order], self.selections)

    def _judge(self, images: Tensor) -> Tensor:
        """Compute the rewards (B,), float32 on the CPU."""
        found = torch.as_tensor(self.reward(images, [self.prompt] * len(images))).detach().float().cpu()
        if found.shape != (len(images),) or not found.isfinite().all():
            raise ValueError(
                f"the reward gave {tuple(found.shape)} for {len(images)} images; expected ({len(images)},) and finite"
            )
        return found

    def _draw(self, rewards: Tensor, count: int) -> Tensor:
        """Draw candidates in proportion to exp(strength x potential); indices (count,)."""
        values = potential(self.config.potential, rewards, self._history)  # (B,)
        scores = self.config.strength / getattr(self.reward, "unit", 1.0) * values  # (B,)
        scores = scores.to("cpu" if self.generator is None else self.generator.device)
        if self.config.replacement:
            return torch.multinomial(scores.softmax(0), count, replacement=True, generator=self.generator).cpu()
        noise = torch.empty_like(scores).exponential_(generator=self.generator)  # (B,)
        return (scores - noise.log()).topk(count).indices.cpu()  # Gumbel-top-k (arXiv 1903.06059)

    def _branch(self, rewards: Tensor, count: int) -> Tensor:
        """Return the best candidates, each repeated until `count` are reached; indices (count,)."""
        best = rewards.argsort(descending=True, stable=True)[: min(self.config.beam_width, count)]  # (W,)
        return best[torch.arange(count) % len(best)]


def potential(kind: str, rewards: Tensor, history: Tensor) -> Tensor:
    """Compute the potential of each candidate (arXiv 2507.18537, section 3.3), (B,).

    Args:
        kind: one of `POTENTIALS`.
        rewards: now, (B,).
        history: at earlier looks, (B, looks).
    """
    if kind == "value" or history.shape[1] == 0:
        return rewards
    if kind == "diff":
        return rewards - history[:, -1]
    every = torch.cat([history, rewards[:, None]], dim=1)  # (B, looks + 1)
    return every.amax(1) if kind == "max" else every.sum(1)


# -------------------------------------------------------------------------- clusters


def downsampled_pixels(images: Tensor) -> Tensor:
    """Downsample images (B, 3, H, W) to vectors (B, F)."""
    return F.adaptive_avg_pool2d(images.float(), FEATURE_SIDE).flatten(1)


def principal_view(tokens: Tensor) -> Tensor:
    """Project patch features to one number a patch: along the first principal component of each image.

    A component's sign is arbitrary; it is chosen such that patches with large features lie on the positive side, so
    that two like images get like vectors.

    Args:
        tokens: (B, N, D), for example DINOv2's patch tokens.

    Returns:
        (B, N).
    """
    centred = tokens.float() - tokens.float().mean(1, keepdim=True)  # (B, N, D)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]  # (B, D)
    view = (centred @ direction[..., None])[..., 0]  # (B, N)
    norms = tokens.float().norm(dim=-1)  # (B, N)
    sign = ((norms - norms.mean(1, keepdim=True)) * view).sum(1, keepdim=True).sign()  # (B, 1)
    return view * torch.where(sign == 0, torch.ones_like(sign), sign)


def medoids(vectors: Tensor, count: int, rounds: int = 50) -> Tensor:
    """Return the member nearest to the centre of each of `count` clusters (k-means, farthest-point initialisation).

    Args:
        vectors: (B, F).
        count: clusters, at most B.
        rounds: limit of the iterations.

    Returns:
        Rising indices, (count,), all different.
    """
    # initial centres: the most central vector, then always the farthest one
    chosen = [int((vectors - vectors.mean(0)).square().sum(1).argmin())]
    while len(chosen) < count:
        nearest = torch.cdist(vectors, vectors[chosen]).amin(1)  # (B,)
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    centres = vectors[chosen].clone()  # (count, F)
    # Lloyd iterations
    for _ in range(rounds):
        owner = torch.cdist(vectors, centres).argmin(1)  # (B,)
        members = [vectors[owner == cluster] for cluster in range(count)]
        moved = torch.stack([own.mean(0) if len(own) else centres[i] for i, own in enumerate(members)])
        if torch.equal(moved, centres):
            break
        centres = moved
    # nearest member of each centre, each taken once
    distances, found = torch.cdist(vectors, centres), []  # (B, count)
    for cluster in range(count):
        near = distances[:, cluster].clone()
        near[found] = torch.inf
        found.append(int(near.argmin()))
    return torch.tensor(sorted(found))
