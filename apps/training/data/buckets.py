"""Aspect-ratio buckets: the few sizes that images of any shape are brought to, so that they can share a batch.

All buckets have about the same area, so they cost about the same time and memory; an image goes to the bucket whose
aspect ratio is nearest to its own, which crops the least. Sizes are (H, W) in pixels.
"""

import math
from collections.abc import Sequence

Size = tuple[int, int]
"""Height and width in pixels."""


def bucket_sizes(resolution: int, step: int, max_aspect_ratio: float) -> list[Size]:
    """List the sizes whose sides are multiples of a step and whose area is at most that of a square.

    Args:
        resolution: Side R of the square in pixels.
        step: What sides must be multiples of, in pixels.
        max_aspect_ratio: Longest side over the shortest one, at least 1.

    Returns:
        (H, W), from the widest to the tallest; the square is always among them. Each is as high as its width allows,
        or as wide as its height does.

    Raises:
        ValueError: If there is no such size, or an argument has no meaning.
    """
    if step < 1 or max_aspect_ratio < 1:
        raise ValueError(f"step = {step} and max_aspect_ratio = {max_aspect_ratio} must be at least 1")
    side = resolution // step * step
    if side < step:
        raise ValueError(f"resolution = {resolution} is smaller than a step of {step} pixels: give at least {step}")
    found = {(side, side)}
    for long in range(side, int(resolution * math.sqrt(max_aspect_ratio)) + step, step):
        short = resolution * resolution // long // step * step
        if short and long <= max_aspect_ratio * short:
            found |= {(long, short), (short, long)}
    return sorted(found, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket whose aspect ratio is nearest; the largest one of those that are equally near.

    Args:
        size: (H, W) of an image.
        buckets: At least one.
    """

    def distance(bucket: Size) -> tuple[float, int, Size]:
        # Compared as logarithms: twice as wide and twice as tall are equally far from a square.
        ratio = math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])
        return round(abs(ratio), 9), -bucket[0] * bucket[1], bucket

    return min(buckets, key=distance)


def cover_scale(size: Size, bucket: Size) -> float:
    """Return by how much an image is scaled to cover its bucket; above 1 it is enlarged."""
    return max(bucket[0] / size[0], bucket[1] / size[1])
