"""Captions: what they say is what the scene holds, and held-out phrasings stay held out."""

import itertools
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.stickers import COLOURS, STARTER, SceneMix, SceneSampler, caption, generator, load_sprites, unique_keywords
from apps.stickers.captions import COUNT, FRAMES, NUMBERS, PAIR, RESERVED, SINGLE, SIZE_WORDS, with_article

SHEET = load_sprites()
SAMPLER = SceneSampler(SHEET, STARTER, split="all")
KEYWORDS = unique_keywords(SHEET, STARTER)
seeds = st.integers(0, 2**63 - 1)
phrasings = st.sampled_from(["train", "heldout"])
KINDS = {"single": SINGLE, "count": COUNT, "left of": PAIR["left of"], "above": PAIR["above"]}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def fixed_words(template: str) -> set[str]:
    """The words of a template itself, without its fields."""
    return words("".join(text for text, *_ in string.Formatter().parse(template)))


@given(seed=seeds, phrasing=phrasings)
def test_a_caption_names_everything(seed: int, phrasing: str) -> None:
    scene = SAMPLER.draw(seed)
    text = caption(scene, SHEET, generator(seed, 1), phrasing, synonyms=0.0)
    for sprite in scene.sprites:
        assert SHEET.names[sprite] in text
    rest = text
    for sprite in sorted(scene.sprites, key=lambda s: -len(SHEET.names[s])):
        rest = rest.replace(SHEET.names[sprite], "*")
    colours = words(rest) & set(COLOURS)
    assert colours == {COLOURS[scene.background]} or (not colours and COLOURS[scene.background] == "white")
    if scene.kind == "count":
        assert words(rest) & set(NUMBERS[scene.count])
    if scene.size_word:
        assert words(rest) & set(SIZE_WORDS[scene.size_word])
    else:
        assert not words(rest) & {word for pair in SIZE_WORDS.values() for word in pair}


@given(seed=seeds, phrasing=phrasings)
def test_a_relation_can_be_read_back(seed: int, phrasing: str) -> None:
    scene = SceneSampler(SHEET, STARTER, mix=SceneMix(single=0, pair=1, count=0)).draw(seed)
    text = caption(scene, SHEET, generator(seed, 2), phrasing, synonyms=0.0)
    assert read_relation(text, *(SHEET.names[sprite] for sprite in scene.sprites)) == scene.relation


# "left of A is B": how A then stands to B
WHERE_THE_NEXT_STANDS = {"left": "right of", "right": "left of", "top": "below", "bottom": "above"}
WHERE_THE_NEXT_STANDS |= {"above": "below", "over": "below", "below": "above", "under": "above", "underneath": "above"}


def read_relation(text: str, first: str, second: str) -> str:
    """An independent little grammar: which word belongs to the sticker that it stands next to."""
    place = text.index(first) if first not in second else text.replace(second, "#" * len(second)).index(first)
    other = text.index(second) if second not in first else text.replace(first, "#" * len(first)).index(second)
    start, end = min(place, other), max(place, other)
    name = first if place < other else second
    before, between, after = text[:start], text[start + len(name) : end], text[end:]
    early = next((w for w in WHERE_THE_NEXT_STANDS if w in words(before)), None)
    inside = words(between)
    listing = "and" in inside or "," in between or ":" in between
    if early and listing:  # "left: A, right: B", "on the right is A, on the left is B"
        earlier_stands = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}[early]
    elif early:  # "to the right of A is B", "below A stands B": the word belongs to the later one
        earlier_stands = WHERE_THE_NEXT_STANDS[early]
    elif listing:  # "A on top, B below"
        earlier_stands = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}[
            next(w for w in ("left", "right", "top", "bottom") if w in inside)
        ]
    else:
        table = {"left": "left of", "right": "right of", "above": "above", "over": "above", "top": "above"}
        table |= dict.fromkeys(("below", "under", "underneath"), "below")
        earlier_stands = next(relation for word, relation in table.items() if word in inside)
    assert after is not None
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    return earlier_stands if place < other else inverse[earlier_stands]


@pytest.mark.parametrize("kind", KINDS)
def test_templates_are_enough_and_held_out_ones_use_known_words(kind: str) -> None:
    train, held_out = KINDS[kind]["train"], KINDS[kind]["heldout"]
    assert len(set(train)) >= 12
    assert len(set(held_out)) >= 3
    assert not set(train) & set(held_out)
    every = [*FRAMES["train"], *(t for templates in KINDS.values() for t in templates["train"])]
    known = set().union(*(fixed_words(template) for template in every)) | {"a"}
    for template in (*held_out, *FRAMES["heldout"]):
        assert fixed_words(template) <= known, template


def test_held_out_captions_are_never_training_captions() -> None:
    for subject_kind in KINDS.values():
        train = {
            frame.format(x=subject, c="red")
            for frame, subject in itertools.product((*FRAMES["train"], "{x}"), subject_kind["train"])
        }
        held_out = {
            frame.format(x=subject, c="red")
            for frame, subject in itertools.product((*FRAMES["heldout"], "{x}"), subject_kind["heldout"])
        }
        assert not train & held_out


def test_keywords_stand_for_one_sticker() -> None:
    owners = [word for found in KEYWORDS.values() for word in found]
    assert len(owners) == len(set(owners)) > 100
    assert not set(owners) & set(STARTER)
    assert not any(words(word) & RESERVED for word in owners)
    assert "apple" in KEYWORDS["red apple"]
    assert "cat" in KEYWORDS["cat face"]
    for name, found in unique_keywords(SHEET).items():
        assert not set(found) & set(SHEET.names), name


@given(seed=seeds)
def test_synonyms_replace_names(seed: int) -> None:
    names = [name for name in STARTER if KEYWORDS[name]]
    scene = SceneSampler(SHEET, names, mix=SceneMix(pair=0, count=0)).draw(seed)
    text = caption(scene, SHEET, generator(seed, 3), synonyms=1.0, vocabulary=STARTER)
    assert any(word in text for word in KEYWORDS[SHEET.names[scene.sprites[0]]])
    again = caption(scene, SHEET, generator(seed, 3), synonyms=1.0, vocabulary=STARTER)
    assert text == again


def test_articles() -> None:
    assert [with_article(name) for name in ("owl", "fox", "unicorn", "ear of corn", "hourglass")] == [
        "an owl",
        "a fox",
        "a unicorn",
        "an ear of corn",
        "a hourglass",
    ]


def test_unknown_phrasings_are_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        caption(SAMPLER.draw(0), SHEET, generator(0, 0), phrasing="test")
