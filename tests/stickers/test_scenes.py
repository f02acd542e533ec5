"""The scene generator: ranges, places, held-out combinations, determinism, whatever the seed."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.stickers import (
    BACKGROUNDS,
    BASIC_COLOURS,
    COLOURS,
    COMMON,
    STARTER,
    Scene,
    SceneMix,
    SceneSampler,
    load_sprites,
)
from apps.stickers.scene import CENTRES, PART_SIZE, SIZES, combinations, is_held_out
from apps.stickers.vocabulary import check

SHEET = load_sprites()
SAMPLERS = {split: SceneSampler(SHEET, STARTER, split=split) for split in ("train", "heldout_combination", "all")}
seeds = st.integers(0, 2**63 - 1)


def scenes(number: int, split: str = "all", **mix: float) -> list[Scene]:
    sampler = SceneSampler(SHEET, STARTER, split=split, mix=SceneMix(**mix))
    return [sampler.scene(7, i) for i in range(number)]


@given(seed=seeds, index=st.integers(0, 2**40), split=st.sampled_from(list(SAMPLERS)))
def test_every_scene_is_well_formed(seed: int, index: int, split: str) -> None:
    scene = SAMPLERS[split].scene(seed, index)
    vocabulary = {SHEET.index(name) for name in STARTER}
    assert set(scene.sprites) == {place.sprite for place in scene.placements} <= vocabulary
    assert len(scene.placements) == scene.count
    assert 0 <= scene.background < 10
    for place in scene.placements:
        low, high = SIZES[scene.size_word] if scene.kind == "single" else PART_SIZE
        assert low <= place.size <= high
        for centre in (place.x, place.y):
            assert centre - place.size / 2 >= -1e-9
            assert centre + place.size / 2 <= 1 + 1e-9
    for one, other in itertools.combinations(scene.placements, 2):
        apart = max(abs(one.x - other.x), abs(one.y - other.y))
        assert apart >= (one.size + other.size) / 2 - 1e-9, "stickers overlap"


@given(seed=seeds, index=st.integers(0, 2**40))
def test_pairs_stand_as_their_relation_says(seed: int, index: int) -> None:
    scene = SceneSampler(SHEET, STARTER, mix=SceneMix(single=0, pair=1, count=0)).scene(seed, index)
    first, second = scene.placements
    assert (first.sprite, second.sprite) == scene.sprites
    assert first.sprite != second.sprite
    clear = {
        "left of": second.x - first.x,
        "right of": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }
    assert clear[scene.relation] > 0.4


@given(seed=seeds, index=st.integers(0, 2**40))
def test_splits_never_meet(seed: int, index: int) -> None:
    train, held_out = SAMPLERS["train"].scene(seed, index), SAMPLERS["heldout_combination"].scene(seed, index)
    assert not any(is_held_out(*each) for each in combinations(train, SHEET))
    assert any(is_held_out(*each) for each in combinations(held_out, SHEET))


def test_about_five_percent_of_combinations_are_held_out() -> None:
    places = ("single", "left", "right", "top", "bottom", "2", "3", "4")
    held_out = [is_held_out(*each) for each in itertools.product(STARTER, COLOURS, places)]
    assert 0.04 < np.mean(held_out) < 0.06


def test_held_out_combinations_are_the_same_for_ever() -> None:
    """A model's scores on them mean nothing if a later version trains on them."""
    held_out = [name for name in STARTER if is_held_out(name, "red", "single")]
    assert held_out == [
        "turtle",
        "whale",
        "spider",
        "pineapple",
        "watermelon",
        "grapes",
        "jack-o-lantern",
        "television",
    ]


@given(seed=seeds)
def test_a_relation_said_the_other_way_is_the_same_combination(seed: int) -> None:
    scene = SceneSampler(SHEET, STARTER, split="all", mix=SceneMix(single=0, pair=1, count=0)).draw(seed)
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.relation]
    turned = replace(scene, sprites=scene.sprites[::-1], relation=inverse)
    assert set(combinations(scene, SHEET)) == set(combinations(turned, SHEET))


@given(seed=seeds, index=st.integers(0, 2**40))
def test_scenes_are_functions_of_seed_and_index(seed: int, index: int) -> None:
    sampler = SAMPLERS["train"]
    scene = sampler.scene(seed, index)
    sampler.scene(seed, index + 1)
    assert sampler.scene(seed, index) == scene
    assert SceneSampler(SHEET, STARTER).scene(seed, index) == scene


def test_the_mix_is_kept_by_every_split() -> None:
    for split in SAMPLERS:
        kinds = [scene.kind for scene in scenes(1000, split, single=0.2, pair=0.5, count=0.3)]
        assert [round(kinds.count(kind) / 1000, 1) for kind in ("single", "pair", "count")] == [0.2, 0.5, 0.3]


def test_without_jitter_scenes_are_centred() -> None:
    for scene in scenes(200, jitter=0.0):
        centres = CENTRES[scene.relation or scene.count]
        assert tuple((place.x, place.y) for place in scene.placements) == centres
        if scene.kind == "single":
            assert scene.placements[0].size == pytest.approx(
                {"small": 0.525, None: 0.7, "large": 0.875}[scene.size_word]
            )


def test_backgrounds_are_well_apart() -> None:
    values = np.array(list(BACKGROUNDS.values()), dtype=float)
    distance = np.linalg.norm(values[:, None] - values, axis=-1) + 1e3 * np.eye(20)
    assert COLOURS[:10] == BASIC_COLOURS
    assert distance[:10, :10].min() >= 75
    assert distance.min() >= 60


def test_scenes_have_the_colours_asked_for() -> None:
    sampler = SceneSampler(SHEET, STARTER, colours=("teal", "navy"))
    assert {COLOURS[sampler.scene(0, index).background] for index in range(40)} == {"teal", "navy"}
    basic = SceneSampler(SHEET, STARTER)
    assert {COLOURS[basic.scene(0, index).background] for index in range(200)} == set(BASIC_COLOURS)
    with pytest.raises(ValueError, match=r"colours are \('azure',\): give one or more of white"):
        SceneSampler(SHEET, STARTER, colours=("azure",))


def test_the_sheet_and_the_starter_vocabulary() -> None:
    assert 1400 <= len(SHEET) <= 1500
    assert len(set(SHEET.names)) == len(SHEET) == len(SHEET.pixels)
    assert not any("button" in name or "skin tone" in name for name in SHEET.names)
    assert len(STARTER) == len(set(STARTER)) == 128
    assert len(COMMON) == len(set(COMMON)) == 256
    assert COMMON[:128] == STARTER
    assert set(COMMON) <= set(SHEET.names)
    assert check(SHEET, STARTER, threshold=0.1) == []
    assert check(SHEET, ["cat face", "grinning face"], threshold=0.1)[0][:2] == (
        "grinning face",
        "grinning face with big eyes",
    )


def test_every_sprite_is_centred_and_fills_its_square() -> None:
    visible = SHEET.pixels[:, 3] > 24  # (S, 128, 128)
    height, width = visible.any(2).sum(1), visible.any(1).sum(1)  # (S,)
    assert (height.maximum(width) >= 122).float().mean() > 0.97
    assert bool(visible.any(2).any(1).all()), "an empty sprite"


@pytest.mark.parametrize("names", [["cat face"], ["cat face", "cat face"]])
def test_useless_vocabularies_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="give 2 or more"):
        SceneSampler(SHEET, names)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(KeyError, match="grinning cat"):
        SceneSampler(SHEET, ["cat fase", "dog face"])
    with pytest.raises(ValueError, match="'heldout_combination'"):
        SceneSampler(SHEET, STARTER, split="test")
    with pytest.raises(ValueError, match="jitter is 2"):
        SceneMix(jitter=2)
    with pytest.raises(ValueError, match="not all zero"):
        SceneMix(single=0, pair=0, count=0)
