"""Prompts to begin with, made of words that the model knows."""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = 5
"""Example buttons on the page; those that a model has no prompt for are hidden."""
FAVOURITES = (
    ("a pizza on a blue background", ("pizza",)),
    ("three cherries on yellow", ("cherries",)),
    ("a penguin left of a rocket", ("penguin", "rocket")),
    ("a small ghost on black", ("ghost",)),
    ("a crown above a frog on pink", ("crown", "frog")),
    ("a big octopus on a green background", ("octopus",)),
    ("a fox on an orange background", ("fox",)),
    ("two stars on purple", ("star",)),
)
"""Prompts of the sticker world and the words each one needs."""

CLIP_FAVOURITES = (
    ("a dolphin leaping on a blue background", ("dolphin",)),
    ("a fox moving to the right on green", ("fox",)),
    ("a butterfly flapping its wings slowly on pink", ("butterfly",)),
    ("a rocket moving up on black", ("rocket",)),
    ("an octopus waving its arms and growing, on yellow", ("octopus",)),
    ("a penguin waddling and moving left on white", ("penguin",)),
)
"""Prompts of the world of moving stickers and the words each one needs."""

PATTERNS = ("{0} on a blue background", "three {1} on yellow", "{2} left of {3} on a pink background")

CLIP_PATTERNS = ("{0} on a blue background", "{1} moving to the left on yellow", "{2} growing on a pink background")

OPEN_WORLD = (
    "a lighthouse at dusk, oil painting",
    "a red fox asleep in fresh snow",
    "still life with lemons and a blue jug",
    "a tiny greenhouse on the moon",
)
"""For models without a list of words."""


def example_prompts(words: Sequence[str], count: int = EXAMPLES, clips: bool = False) -> list[str]:
    """Choose prompts that a model can generate.

    Args:
        words: the model's vocabulary; empty when it has none.
        count: how many prompts at most.
        clips: whether the model makes clips.

    Returns:
        Prompts whose nouns are all in the vocabulary.
    """
    if not words:
        return list(OPEN_WORLD[:count])
    known = set(words)
    favourites, patterns = (CLIP_FAVOURITES, CLIP_PATTERNS) if clips else (FAVOURITES, PATTERNS)
    chosen = [prompt for prompt, needs in favourites if known.issuperset(needs)]
    spread = [words[i * len(words) // 4] for i in range(4)]
    chosen += [pattern.format(*spread) for pattern in patterns]
    return chosen[:count]
