"""What people would type for a scene: many phrasings, some of them held out, and other words for the stickers.

A caption is a subject ("a red apple left of a bus") in a frame that names the background ("{x} on a {c} background").
Colour words outside a sticker's name always belong to the background. A caption without one means white.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from apps.stickers.scene import COLOURS, INVERSE, Scene
from apps.stickers.sprites import SpriteSheet

Phrasing = Literal["train", "heldout"]
Pick = Callable[[Sequence[str]], str]  # takes one of several

# {x} is the subject, {c} the colour.
FRAMES: dict[str, tuple[str, ...]] = {
    "train": (
        "{x} on a {c} background",
        "{x} on {c}",
        "{x} against {c}",
        "{x} against a {c} background",
        "{x} with a {c} background",
        "{x}, {c} background",
        "{c} background, {x}",
        "{c} background: {x}",
        "a {c} background with {x}",
        "on a {c} background, {x}",
        "on {c}: {x}",
        "{x} in front of a {c} background",
        "{x}, the background is {c}",
    ),
    "heldout": (
        "the background is {c}: {x}",
        "against a {c} background, {x}",
        "in front of a {c} background: {x}",
    ),
}
# {n} is the bare name, {a} the name with its article, {k} a number, {p} and {q} the two stickers of a pair.
SINGLE: dict[str, tuple[str, ...]] = {
    "train": (
        "{n}",
        "{a}",
        "{a} sticker",
        "one {n}",
        "one {n} sticker",
        "a single {n}",
        "just {a}",
        "the {n}",
        "a sticker of {a}",
        "a picture of {a}",
        "a drawing of {a}",
        "there is {a}",
        "an emoji of {a}",
    ),
    "heldout": ("a picture of one {n}", "there is just one {n} sticker", "a drawing of a single {n}"),
}
COUNT: dict[str, tuple[str, ...]] = {
    "train": (
        "{k} {n}",
        "{k} {n} stickers",
        "{k} x {n}",
        "{k} times {n}",
        "{n}, {k} times",
        "a group of {k} {n}",
        "a group of {k} {n} stickers",
        "{k} copies of {a}",
        "there are {k} {n}",
        "a picture of {k} {n}",
        "exactly {k} {n} stickers",
        "{k} of the same {n}",
        "a set of {k} {n}",
    ),
    "heldout": ("the same {n} {k} times", "there are exactly {k} {n} stickers", "a picture of {k} copies of {a}"),
}
# A relation said from the side of {p} or of {q} in any of these forms: {r} stands between the two, or before both.
RELATION_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "left of": {
        "{p} {r} {q}": ("left of", "to the left of", "on the left of"),
        "{q} {r} {p}": ("right of", "to the right of", "on the right of"),
    },
    "above": {
        "{p} {r} {q}": ("above", "over", "on top of"),
        "{q} {r} {p}": ("below", "under", "underneath"),
    },
}
RELATION_FORMS = (
    "{x} {r} {y}",
    "{x} {r} {y}",  # what people write most
    "{x} {r} {y}",
    "{x} is {r} {y}",
    "{x} stands {r} {y}",
    "there is {x} {r} {y}",
    "{r} {y} is {x}",
    "{r} {y} stands {x}",
    "{r} {y} there is {x}",
)
LISTS: dict[str, tuple[str, ...]] = {
    "left of": (
        "{p} on the left, {q} on the right",
        "{p} on the left and {q} on the right",
        "{q} on the right and {p} on the left",
        "{q} on the right, {p} on the left",
        "on the left {p}, on the right {q}",
        "on the left {p} and on the right {q}",
        "on the right is {q}, on the left is {p}",
        "left: {p}, right: {q}",
        "right: {q}, left: {p}",
    ),
    "above": (
        "{p} on top, {q} below",
        "{p} at the top and {q} at the bottom",
        "{q} at the bottom and {p} at the top",
        "{q} at the bottom, {p} at the top",
        "at the top {p}, at the bottom {q}",
        "at the top {p} and at the bottom {q}",
        "at the bottom is {q}, at the top is {p}",
        "top: {p}, bottom: {q}",
        "bottom: {q}, top: {p}",
    ),
}
HELD_OUT_RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("on the right {q}, on the left {p}", "to the right of {p} is {q}", "{q} is right of {p}"),
    "above": ("at the bottom {q}, at the top {p}", "below {p} is {q}", "{q} is under {p}"),
}


def _relation_phrasings(relation: str) -> dict[str, tuple[str, ...]]:
    """All forms with all words but the held-out ones, and each list twice: about a third of the whole."""
    held_out = HELD_OUT_RELATIONS[relation]
    phrasings = []
    for order, words in RELATION_WORDS[relation].items():
        x, y = order.split(" {r} ")
        said = [form.format(x=x, r=word, y=y) for word in words for form in RELATION_FORMS]
        phrasings += [text for text in said if text not in held_out]
    return {"train": (*phrasings, *LISTS[relation], *LISTS[relation]), "heldout": held_out}


PAIR: dict[str, dict[str, tuple[str, ...]]] = {relation: _relation_phrasings(relation) for relation in RELATION_WORDS}
# Other words for the colours; a caption uses one as often as it uses a keyword in place of a name.
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "blue": ("royal blue",),
    "green": ("dark green",),
    "pink": ("light pink",),
    "gray": ("grey",),
    "purple": ("violet",),
    "navy": ("navy blue", "dark blue"),
    "cyan": ("turquoise", "aqua", "sky blue", "light blue"),
    "lime": ("light green", "lime green"),
    "maroon": ("dark red", "burgundy", "crimson"),
    "beige": ("tan",),
    "lavender": ("lilac", "light purple"),
    "magenta": ("fuchsia", "hot pink"),
    "mint": ("mint green",),
}
SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
NAMELESS_WHITE = 0.3  # share of the white scenes whose caption says nothing of the background

# Words that say something about a scene; no synonym may hold one of them.
_SCENE_WORDS = """grey zero one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9 10 left right above
below over under underneath top bottom up down on of small large tiny big sticker stickers background emoji picture
drawing color colour single group set copy copies"""
_OTHER_COLOURS = [word for words in COLOUR_WORDS.values() for word in words if " " not in word]
RESERVED = frozenset((*COLOURS, *_OTHER_COLOURS, *_SCENE_WORDS.split()))


def with_article(name: str) -> str:
    """Put "a" or "an" before a name, by its first letter."""
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'eu', 'one', 'u.')) else 'a'} {name}"


@functools.lru_cache(maxsize=8)
def _unique_keywords(sheet: SpriteSheet, vocabulary: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    owners: dict[str, set[str]] = {}
    for name in vocabulary:
        for word in (name, *sheet.keywords[sheet.index(name)]):
            owners.setdefault(word, set()).add(name)
    unique: dict[str, tuple[str, ...]] = {}
    for name in vocabulary:
        words = dict.fromkeys(sheet.keywords[sheet.index(name)])
        unique[name] = tuple(
            word
            for word in words
            if word and word != name and len(owners[word]) == 1 and not RESERVED & set(word.replace("-", " ").split())
        )
    return unique


def unique_keywords(sheet: SpriteSheet, vocabulary: Sequence[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Find the words that stand for one sticker only.

    Args:
        sheet: the stickers with their CLDR keywords.
        vocabulary: the names among which a keyword must be unique; None takes all.

    Returns:
        For each name its keywords that belong to no other name of the vocabulary, aren't such a name themselves, and
        hold no colour, number, size or place word. Some names have none.
    """
    return _unique_keywords(sheet, tuple(sheet.names if vocabulary is None else vocabulary))


def caption(
    scene: Scene,
    sheet: SpriteSheet,
    rng: np.random.Generator,
    phrasing: Phrasing = "train",
    synonyms: float = 0.15,
    vocabulary: Sequence[str] | None = None,
    colour_words: bool = False,
) -> str:
    """Says a scene in words.

    Args:
        scene: what to say.
        sheet: the stickers.
        rng: picks the phrasing.
        phrasing: "train", or "heldout" for phrasings that training never uses (their words all occur in training).
        synonyms: probability that a sticker goes by one of its unique keywords, where it has any.
        vocabulary: the names among which keywords must be unique; None takes all.
        colour_words: whether a colour goes by another word for it as often as a sticker by a keyword.

    Raises:
        ValueError: the phrasing is unknown.
    """
    if phrasing not in FRAMES:
        raise ValueError(f"phrasing is {phrasing!r}: give 'train' or 'heldout'")

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    keywords = unique_keywords(sheet, vocabulary) if synonyms > 0 else {}
    names = []
    for sprite in scene.sprites:
        name = sheet.names[sprite]
        others = keywords.get(name, ())
        names.append(pick(others) if others and rng.random() < synonyms else name)
    if scene.kind == "pair":
        subject = _pair_subject(scene, names, phrasing, pick)
    elif scene.kind == "count":
        number = pick(NUMBERS[scene.count])
        subject = pick(COUNT[phrasing]).format(k=number, n=names[0], a=with_article(names[0]))
    else:
        name = f"{pick(SIZE_WORDS[scene.size_word])} {names[0]}" if scene.size_word else names[0]
        subject = pick(SINGLE[phrasing]).format(n=name, a=with_article(name))
    colour = COLOURS[scene.background]
    if colour == "white" and rng.random() < NAMELESS_WHITE:
        return subject
    others = COLOUR_WORDS.get(colour, ()) if colour_words else ()
    if others and rng.random() < synonyms:
        colour = pick(others)
    frame = pick(FRAMES[phrasing])
    return frame.replace("a {c}", with_article(colour)).format(x=subject, c=colour)


def _pair_subject(scene: Scene, names: Sequence[str], phrasing: Phrasing, pick: Pick) -> str:
    """Says a relation, in one style of articles for both stickers."""
    style = pick(("{n}", "{a}", "the {n}", "{a} sticker"))
    first, second = (style.format(n=name, a=with_article(name)) for name in names)
    relation = scene.relation or ""
    if relation not in PAIR:  # "right of" and "below" are said from the other side
        relation, first, second = INVERSE[relation], second, first
    return pick(PAIR[relation][phrasing]).format(p=first, q=second)
