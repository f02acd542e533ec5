"""Captions of clips: what they say is what the scene holds, and held-out phrasings stay held out."""

import itertools
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.stickers import COLOURS, generator
from apps.stickers.captions import FRAMES, Phrasing
from apps.stickers.moving import ClipMix, ClipScene, ClipSceneSampler, clip_caption, load_clips
from apps.stickers.moving.captions import ACTIONS, ALONE, IN_ADDITION, MOVES, PACES, PASSING, STILL_WORDS, WRAPS
from apps.stickers.moving.scene import OPPOSITE

SHEET = load_clips()
SAMPLER = ClipSceneSampler(SHEET, split="all")
PAIRS = ClipSceneSampler(SHEET, split="all", mix=ClipMix(single=0))
EVEN = ClipSceneSampler(SHEET, split="all", mix=ClipMix(still=1, slow=1, fast=1, backwards=1, animated=1, passing=0))
seeds = st.integers(0, 2**63 - 1)
phrasings = st.sampled_from(["train", "heldout"])


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9-]+", text))


def fixed_words(template: str) -> set[str]:
    """The words of a template itself, without its fields."""
    return words("".join(text for text, *_ in string.Formatter().parse(template)))


def without_names(text: str, scene: ClipScene) -> str:
    for clip in sorted((sticker.clip for sticker in scene.stickers), key=lambda clip: -len(SHEET.names[clip])):
        text = text.replace(SHEET.names[clip], "*")
    return text


@given(seed=seeds, phrasing=phrasings)
def test_a_caption_names_who_and_the_colour(seed: int, phrasing: Phrasing) -> None:
    scene = SAMPLER.draw(seed)
    text = clip_caption(scene, SHEET, generator(seed, 1), phrasing, synonyms=0.0)
    assert text == text.lower()
    assert text.isascii()
    assert re.fullmatch(r"[a-z0-9 ,:'.-]+", text)
    assert "  " not in text
    for sticker in scene.stickers:
        assert SHEET.names[sticker.clip] in text or SHEET.nouns[sticker.clip] in text
    colour = COLOURS[scene.background]
    found = words(without_names(text, scene)) & set(COLOURS)
    assert found == {colour} or (not found and colour == "white")


@given(seed=seeds, phrasing=phrasings)
def test_the_own_motion_can_be_read_back(seed: int, phrasing: Phrasing) -> None:
    scene = EVEN.draw(seed)
    own, verb = scene.stickers[0].own, SHEET.verbs[scene.stickers[0].clip]
    text = clip_caption(scene, SHEET, generator(seed, 2), phrasing, synonyms=0.0)
    said = {motion: any(pace in text.split(verb)[-1] for pace in paces) for motion, paces in PACES.items()}
    if own == "still":
        assert words(text) & set(STILL_WORDS)
    elif own == "animated":
        assert not any(said.values()) or verb not in text
        assert scene.motion != "stays" or verb in text
        assert not words(text) & set(STILL_WORDS)
    else:
        assert verb in text
        assert [motion for motion, is_said in said.items() if is_said] == [own]


@given(seed=seeds, phrasing=phrasings)
def test_the_scene_motion_can_be_read_back(seed: int, phrasing: Phrasing) -> None:
    scene = EVEN.draw(seed)
    text = clip_caption(scene, SHEET, generator(seed, 3), phrasing, synonyms=0.0)
    rest = without_names(text, scene).replace(SHEET.verbs[scene.stickers[0].clip], "*")
    said = {motion for motion, phrases in MOVES.items() if any(re.search(rf"\b{one}\b", rest) for one in phrases)}
    assert said == ({scene.motion} - {"stays"})


@given(seed=seeds, phrasing=phrasings)
def test_a_pair_can_be_read_back(seed: int, phrasing: Phrasing) -> None:
    scene = PAIRS.draw(seed)
    first, second = (SHEET.names[sticker.clip] for sticker in scene.stickers)
    text = clip_caption(scene, SHEET, generator(seed, 4), phrasing, synonyms=0.0)
    for name in sorted((first, second), key=len, reverse=True):
        text = text.replace(name, "first" if name == first else "second")
    moves = {d: any(re.search(rf"\b{one}\b", text) for one in MOVES[d]) for d in OPPOSITE}
    assert moves[scene.motion] or moves[OPPOSITE[scene.motion]]
    assert not any(moves[d] for d in OPPOSITE if d not in (scene.motion, OPPOSITE[scene.motion]))
    # Whoever stands last before a direction moves there.
    for match in re.finditer(r"(?:moving|going|sliding) (?:to the )?(left|right|up|down)(?:wards)?", text):
        before = re.findall(r"first|second", text[: match.start()])[-1]
        assert match[1] == (scene.motion if before == "first" else OPPOSITE[scene.motion]), text


def test_templates_are_enough_and_held_out_ones_use_known_words() -> None:
    for table in (WRAPS, PASSING):
        assert len(set(table["train"])) >= 12
        assert len(set(table["heldout"])) >= 3
        assert not set(table["train"]) & set(table["heldout"])
    assert sum(len(set(forms)) for forms in ACTIONS.values()) >= 12
    tables = (FRAMES["train"], WRAPS["train"], PASSING["train"], IN_ADDITION, ALONE, *ACTIONS.values())
    known = {word for table in tables for template in table for word in fixed_words(template)}
    for template in (*WRAPS["heldout"], *PASSING["heldout"], *FRAMES["heldout"]):
        assert fixed_words(template) <= known, template


def test_held_out_captions_are_never_training_captions() -> None:
    train = {
        frame.format(x=wrap.format(x="a fox"), c="red")
        for frame, wrap in itertools.product((*FRAMES["train"], "{x}"), WRAPS["train"])
    }
    held_out = {
        frame.format(x=wrap.format(x="a fox"), c="red")
        for frame, wrap in itertools.product((*FRAMES["heldout"], "{x}"), WRAPS["heldout"])
    }
    assert not train & held_out


def test_one_scene_is_said_in_many_ways_and_by_other_names() -> None:
    bees = ClipSceneSampler(SHEET, ["honeybee", "fox"], split="all")
    scene = next(s for s in map(bees.draw, range(100)) if [SHEET.names[one.clip] for one in s.stickers] == ["honeybee"])
    said = {clip_caption(scene, SHEET, generator(1, i), synonyms=0.0) for i in range(100)}
    assert len(said) > 60
    others = [clip_caption(scene, SHEET, generator(1, i), synonyms=1.0) for i in range(20)]
    assert all("bee" in words(text) and "honeybee" not in text for text in others)


def test_unknown_phrasings_are_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        clip_caption(SAMPLER.draw(0), SHEET, generator(0, 0), phrasing="test")  # type: ignore[arg-type]
