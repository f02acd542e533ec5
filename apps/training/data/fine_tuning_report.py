"""What is said about the files of a fine-tuning set when it is opened: all that happens to them without being asked."""

from collections import Counter
from collections.abc import Sequence

from apps.training.data.buckets import cover_scale
from apps.training.data.clip_excerpts import is_clip
from apps.training.data.file_rows import Example, Framing

MAX_NAMED = 5  # files that a message names
CROPPED = 1 / 3  # share of an image that may be cut off without a word


def describe(examples: Sequence[Example], framing: Framing) -> list[str]:
    """Describe what becomes of the files.

    Args:
        examples: At least one.
        framing: How they become pixels.

    Returns:
        Sentences, the sizes first.
    """
    counts = sorted(Counter(example.bucket for example in examples).items())
    sizes = ", ".join(f"{'x'.join(map(str, bucket))}: {count}" for bucket, count in counts)
    said = [f"files by frames x height x width: {sizes}"]
    return said + _enlarged(examples, framing) + _cropped(examples, framing) + _clips(examples, framing)


def named(texts: Sequence[str]) -> str:
    """Join the first of some texts, and say how many more there are."""
    more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
    return ", ".join(texts[:MAX_NAMED]) + more


def _enlarged(examples: Sequence[Example], framing: Framing) -> list[str]:
    small = [
        f"{example.entry.name} ({example.facts.height} x {example.facts.width} to {height} x {width})"
        for example in examples
        for _, height, width in [example.bucket]
        if _scale(example, framing) > 1
    ]
    if not small:
        return []
    return [
        f"{len(small)} file(s) are smaller than their size in training and are enlarged, which trains blur: "
        f"{named(small)}; give larger files or a smaller data.resolution"
    ]


def _scale(example: Example, framing: Framing) -> float:
    """Return the largest factor that a file is scaled by."""
    facts, (_, height, width) = example.facts, example.bucket
    if framing.fit == "pad":
        return min(height / facts.height, width / facts.width)
    return cover_scale((facts.height, facts.width), (height, width))


def _cropped(examples: Sequence[Example], framing: Framing) -> list[str]:
    if framing.fit != "crop":
        return []
    cut = []
    for example in examples:
        facts, (_, height, width) = example.facts, example.bucket
        scale = cover_scale((facts.height, facts.width), (height, width))
        lost = 1 - height * width / (scale * scale * facts.height * facts.width)
        if lost > CROPPED:
            cut.append(f"{example.entry.name} ({lost:.0%})")
    if not cut:
        return []
    return [
        f"{len(cut)} file(s) lose more than a third to cropping: {named(cut)}; "
        "crop them yourself, or change data.aspect_ratio_buckets, data.max_aspect_ratio or data.fit"
    ]


def _clips(examples: Sequence[Example], framing: Framing) -> list[str]:
    clips = [example for example in examples if is_clip(example.entry.path)]
    if framing.num_frames == 1:
        said = f"{len(clips)} clip(s) give the frame in their middle (data.num_frames = 1)"
        return [said] if clips else []
    if not clips:
        return [f"data.num_frames = {framing.num_frames}, but no file is a clip: every example is a single frame"]
    rate = framing.frame_rate
    slow = [
        f"{example.entry.name} ({example.facts.frame_rate:.3g})"
        for example in clips
        if rate is not None and example.facts.frame_rate < 0.99 * rate
    ]
    if not slow:
        return []
    return [
        f"{len(slow)} clip(s) have fewer frames a second than data.frame_rate = {rate}, so frames are shown twice: "
        f"{named(slow)}"
    ]
