"""Which starter names a style is learned from, which it is tested on, and how both are asked for."""

from apps.stickers.captions import with_article
from apps.stickers.vocabulary import STARTER

TRIGGER = "plastic"
"""Asks for the style, behind any caption.

The built-in model never saw the word, and draws nearly the same with it as without (42 dB). Words that hold parts of
words it knows ask for something else: with "3d style" it draws three cucumbers in place of anything, because of "3".
"""

TRAINING = (
    "tiger face",
    "panda",
    "frog",
    "elephant",
    "parrot",
    "dolphin",
    "crab",
    "honeybee",
    "red apple",
    "banana",
    "hamburger",
    "doughnut",
    "eggplant",
    "mushroom",
    "bus",
    "rocket",
    "clown face",
    "robot",
    "house",
    "evergreen tree",
    "sunflower",
    "guitar",
    "wrapped gift",
    "camera",
)
"""Chosen by eye: fur, feathers, shells, fruit, metal, faces, buildings and plants, of all hues, dark and light."""

UNSEEN = tuple(name for name in STARTER if name not in TRAINING)


def with_trigger(caption: str, trigger: str = TRIGGER) -> str:
    """Put the words that ask for the style behind a caption; none leave it as it is."""
    return f"{caption}, {trigger}" if trigger else caption


def plain_caption(name: str, colour: str, trigger: str = TRIGGER) -> str:
    """Ask for one sticker in the world's plainest words, such as "a fox on a white background, plastic".

    Args:
        name: of the sticker.
        colour: of the background.
        trigger: words that ask for the style; empty for the flat style.
    """
    return with_trigger(f"{with_article(name)} on {with_article(colour)} background", trigger)
