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
PAIR: dict[str, dict[str, tuple[str, ...]]] = {
    "left of": {
        "train": (
            "{p} left of {q}",
            "{p} to the left of {q}",
            "{p} on the left of {q}",
            "{p} is to the left of {q}",
            "{q} right of {p}",
            "{q} to the right of {p}",
            "{q} on the right of {p}",
            "{q} is to the right of {p}",
            "{p} on the left, {q} on the right",
            "{p} on the left and {q} on the right",
            "{q} on the right and {p} on the left",
            "on the left {p}, on the right {q}",
            "left: {p}, right: {q}",
            "right: {q}, left: {p}",
        ),
        "heldout": ("on the right {q}, on the left {p}", "to the right of {p} is {q}", "{q} is right of {p}"),
    },
    "above": {
        "train": (
            "{p} above {q}",
            "{p} on top of {q}",
            "{p} over {q}",
            "{p} is above {q}",
            "{q} below {p}",
            "{q} under {p}",
            "{q} underneath {p}",
            "{q} is below {p}",
            "{p} on top, {q} below",
            "{p} at the top and {q} at the bottom",
            "{q} at the bottom and {p} at the top",
            "at the top {p}, at the bottom {q}",
            "top: {p}, bottom: {q}",
            "bottom: {q}, top: {p}",
        ),
        "heldout": ("at the bottom {q}, at the top {p}", "below {p} is {q}", "{q} is under {p}"),
    },
}
SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
NAMELESS_WHITE = 0.3  # share of the white scenes whose caption says nothing of the background

# Words that say something about a scene; no synonym may hold one of them.
_SCENE_WORDS = """grey zero one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9 10 left right above
below over under underneath top bottom up down on of small large tiny big sticker stickers background emoji picture
drawing color colour single group set copy copies"""
RESERVED = frozenset((*COLOURS, *_SCENE_WORDS.split()))


def with_article(name: str) -> str:
    """Puts "a" or "an" before a name, by its first letter."""
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
    """Finds the words that stand for one sticker only.

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
    reading_order: float | None = None,
) -> str:
    """Says a scene in words.

    Args:
        scene: what to say.
        sheet: the stickers.
        rng: picks the phrasing.
        phrasing: "train", or "heldout" for phrasings that training never uses (their words all occur in training).
        synonyms: probability that a sticker goes by one of its unique keywords, where it has any.
        vocabulary: the names among which keywords must be unique; None takes all.
        reading_order: probability that a pair's left or upper sticker is said first; None lets all phrasings be
            equally likely. While both orders are about as likely, neither order nor relation word alone says which
            sticker stands where, and a network that starts to learn finds no slope; with most captions in reading
            order it first learns the order, then what the words change.

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
        in_order = None if reading_order is None else bool(rng.random() < reading_order)
        subject = _pair_subject(scene, names, phrasing, pick, in_order)
    elif scene.kind == "count":
        number = pick(NUMBERS[scene.count])
        subject = pick(COUNT[phrasing]).format(k=number, n=names[0], a=with_article(names[0]))
    else:
        name = f"{pick(SIZE_WORDS[scene.size_word])} {names[0]}" if scene.size_word else names[0]
        subject = pick(SINGLE[phrasing]).format(n=name, a=with_article(name))
    colour = COLOURS[scene.background]
    if colour == "white" and rng.random() < NAMELESS_WHITE:
        return subject
    frame = pick(FRAMES[phrasing])
    return frame.replace("a {c}", with_article(colour)).format(x=subject, c=colour)


def _pair_subject(scene: Scene, names: Sequence[str], phrasing: Phrasing, pick: Pick, in_order: bool | None) -> str:
    """Says a relation from either side (`in_order`: the left or upper one first), in one style of articles for both."""
    style = pick(("{n}", "{a}", "the {n}", "{a} sticker"))
    first, second = (style.format(n=name, a=with_article(name)) for name in names)
    relation = scene.relation or ""
    if relation not in PAIR:  # "right of" and "below" are said from the other side
        relation, first, second = INVERSE[relation], second, first
    options = PAIR[relation][phrasing]
    if in_order is not None:
        options = tuple(text for text in options if (text.index("{p}") < text.index("{q}")) == in_order)
    return pick(options).format(p=first, q=second)
