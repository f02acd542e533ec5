"""Which examples a batch holds, when all of a batch must have the same size: a pure function of its address.

Each bucket has an endless series of permutations of its members, and its batches take the next ones from it: a bucket
smaller than a batch goes on into its next permutation. Which bucket has a batch is shuffled within each epoch. After
E epochs a bucket of n members has had ceil(E n / B) batches of B, so all members are seen equally often, whatever the
size of their bucket; where B divides n, exactly once an epoch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from apps.training.data.base import BatchAddress

BUCKETS, MEMBERS = 3, 4  # series of random numbers: of the order of buckets, and of the members of one


class BucketSchedule:
    """Batches of members of one bucket each.

    Args:
        buckets: Numbers of the members of each bucket; one that is to be seen k times an epoch is there k times.
        series: Tells schedules of one run apart.

    Raises:
        ValueError: If there is no bucket, or one is empty.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], series: int = 0) -> None:
        if not buckets or not all(len(bucket) for bucket in buckets):
            raise ValueError(f"a schedule needs at least one bucket and no empty one, got {buckets}")
        self.buckets = [np.asarray(bucket, dtype=np.int64) for bucket in buckets]
        self.counts = tuple(len(bucket) for bucket in self.buckets)
        self.series = series

    def draw(self, address: BatchAddress) -> np.ndarray:
        """Return the members of a batch, (B,)."""
        epoch = self._epoch(address.number, address.size)
        turns = _turns(self.counts, self.series, address.seed, epoch, address.size)
        turn = address.number - _batches_before(self.counts, epoch, address.size)
        bucket = int(turns[turn])
        before = -(-epoch * self.counts[bucket] // address.size) + int((turns[:turn] == bucket).sum())
        positions = before * address.size + np.arange(address.size)  # (B,) in the endless series of permutations
        passes, places = np.divmod(positions, self.counts[bucket])
        orders = [_order(self.counts[bucket], self.series, address.seed, bucket, int(number)) for number in passes]
        chosen = [order[place] for order, place in zip(orders, places, strict=True)]
        return self.buckets[bucket][chosen]

    def _epoch(self, number: int, size: int) -> int:
        """Return the epoch that batch `number` belongs to: the last one that has begun by then."""
        # `sum(counts)` members an epoch in batches of `size`: later than this none can have begun.
        latest = number * size // sum(self.counts) + 1
        epochs = range(latest + 1)
        return bisect_right(epochs, number, key=lambda epoch: _batches_before(self.counts, epoch, size)) - 1


def _batches_before(counts: tuple[int, ...], epoch: int, size: int) -> int:
    """Return how many batches all epochs before `epoch` have."""
    return sum(-(-epoch * count // size) for count in counts)


@lru_cache(maxsize=16)
def _turns(counts: tuple[int, ...], series: int, seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the bucket of each batch of an epoch, in a shuffled order."""
    batches = [-(-(epoch + 1) * count // size) + (epoch * -count // size) for count in counts]
    turns = np.repeat(np.arange(len(counts)), batches)
    return np.random.default_rng((seed, epoch, series, BUCKETS)).permutation(turns)


@lru_cache(maxsize=64)
def _order(count: int, series: int, seed: int, bucket: int, number: int) -> np.ndarray:
    """Return permutation `number` of the members of a bucket, (count,)."""
    return np.random.default_rng((seed, number, series, MEMBERS, bucket)).permutation(count)
