"""Scenes of clips: determinism, ranges, held-out combinations, mixes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.stickers.moving import ClipMix, ClipScene, ClipSceneSampler, load_clips
from apps.stickers.moving.renderer import poses
from apps.stickers.moving.scene import OPPOSITE, SIDES, STAYING_SIZE, STEP, TURNS, SceneMotion, combinations
from apps.stickers.scene import is_held_out

SHEET = load_clips()
SAMPLERS = {split: ClipSceneSampler(SHEET, split=split) for split in ("train", "heldout_combination", "all")}
WIDE = ClipSceneSampler(SHEET, split="all", mix=ClipMix(jitter=1.0))
seeds = st.integers(0, 2**63 - 1)


@given(seed=seeds, index=st.integers(0, 2**40))
def test_every_scene_is_well_formed(seed: int, index: int) -> None:
    scene = WIDE.scene(seed, index)
    assert 0 <= scene.background < 10
    assert len(scene.stickers) == (1 if scene.kind == "single" else 2)
    for sticker in scene.stickers:
        assert sticker.own in SHEET.motions[sticker.clip]
        assert scene.motion not in TURNS or SHEET.turnable[sticker.clip]
        for pose in poses(sticker, 5):
            for centre in (pose.x, pose.y):
                assert centre - pose.size / 2 > -0.02
                assert centre + pose.size / 2 < 1.02


@given(seed=seeds)
def test_tracks_do_what_the_motion_says(seed: int) -> None:
    scene = WIDE.scene(seed, 0)
    moves: list[SceneMotion] = [scene.motion] if scene.kind == "single" else [scene.motion, OPPOSITE[scene.motion]]
    for sticker, motion in zip(scene.stickers, moves, strict=True):
        start, end = sticker.start, sticker.end
        dx, dy = STEP.get(motion, (0, 0))
        assert (end.x - start.x) * dx >= 0.38 * abs(dx)
        assert (end.y - start.y) * dy >= 0.38 * abs(dy)
        assert end.x == pytest.approx(start.x) or dx
        assert end.y == pytest.approx(start.y) or dy
        ratio = {"grows": 2, "shrinks": 0.5}.get(motion, 1)
        assert end.size / start.size == pytest.approx(ratio, rel=0.3 if ratio != 1 else 1e-9)
        assert end.angle == pytest.approx({"clockwise": 180, "anticlockwise": -180}.get(motion, 0), abs=21)
        assert motion in TURNS or end.angle == 0
    if scene.kind == "passing":
        first, second = scene.stickers
        assert scene.side in SIDES[scene.motion]
        lanes = (first.start.y, second.start.y) if scene.side in ("above", "below") else (first.start.x, second.start.x)
        assert (lanes[0] < lanes[1]) == (scene.side in ("above", "left of"))
        assert abs(lanes[0] - lanes[1]) > (first.start.size + second.start.size) / 2


def test_scenes_are_a_function_of_seed_and_index() -> None:
    sampler = SAMPLERS["train"]
    later = [sampler.scene(3, i) for i in (7, 2)]
    assert [ClipSceneSampler(SHEET).scene(3, i) for i in (7, 2)] == later
    assert sampler.scene(4, 7) != later[0]


def test_held_out_combinations_stay_apart() -> None:
    for split, sampler in SAMPLERS.items():
        scenes = [sampler.scene(5, i) for i in range(150)]
        held_out = [any(is_held_out(*one) for one in combinations(scene, SHEET)) for scene in scenes]
        assert (sum(held_out) / 150) in {"train": [0], "heldout_combination": [1]}.get(split, [sum(held_out) / 150])
        assert split != "all" or 0.01 < sum(held_out) / 150 < 0.15


def counted(scenes: list[ClipScene]) -> Counter[str]:
    return Counter(word for scene in scenes for word in (scene.kind, scene.motion, scene.stickers[0].own))


def test_mixes_are_kept() -> None:
    mix = ClipMix(passing=0, stays=0, moves=1, grows=1, shrinks=0, turns=0, animated=0, still=1, slow=0, fast=0)
    sampler = ClipSceneSampler(SHEET, mix=mix)
    found = counted([sampler.scene(1, i) for i in range(200)])
    assert found["single"] == 200
    assert 70 < found["grows"] < 130
    assert found["left"] + found["right"] + found["up"] + found["down"] == 200 - found["grows"]
    assert found["still"] + found["backwards"] == 200
    assert found["still"] > found["backwards"]
    still = ClipSceneSampler(SHEET, mix=ClipMix(jitter=0, passing=0, moves=0, grows=0, shrinks=0, turns=0))
    assert {still.scene(1, i).stickers[0].start for i in range(20)} == {still.scene(2, 0).stickers[0].start}


def test_a_high_jitter_power_keeps_most_scenes_near_the_middle() -> None:
    def sizes(power: float) -> np.ndarray:
        mix = ClipMix(jitter=1.0, jitter_power=power, passing=0, moves=0, grows=0, shrinks=0, turns=0)
        sampler = ClipSceneSampler(SHEET, mix=mix)
        return np.array([sampler.scene(0, index).stickers[0].start.size for index in range(400)])

    even, near = (
        np.abs(sizes(power) - sum(STAYING_SIZE) / 2) / (STAYING_SIZE[1] - STAYING_SIZE[0]) for power in (1, 3)
    )
    assert np.median(even) == pytest.approx(0.25, abs=0.04)
    assert np.median(near) == pytest.approx(0.0625, abs=0.02)  # 0.5 * 0.5^3
    assert near.max() == pytest.approx(0.5, abs=0.03)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="2 or more, once each"):
        ClipSceneSampler(SHEET, ["dolphin", "dolphin"])
    with pytest.raises(KeyError, match="no clip is called 'dolfin'"):
        ClipSceneSampler(SHEET, ["dolphin", "dolfin"])
    with pytest.raises(ValueError, match="give 'train'"):
        ClipSceneSampler(SHEET, split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="colours are"):
        ClipSceneSampler(SHEET, colours=["blurple"])
    with pytest.raises(ValueError, match="none of the 2 names can turn"):
        ClipSceneSampler(SHEET, ["cyclone", "dolphin"])
    with pytest.raises(ValueError, match=r"jitter_power is 0\.5: give a number of 1 or more"):
        ClipMix(jitter_power=0.5)
    with pytest.raises(ValueError, match="jitter is 2"):
        ClipMix(jitter=2)
    with pytest.raises(ValueError, match="not all zero"):
        ClipMix(single=0, passing=0)
