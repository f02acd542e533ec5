"""The judge: its ceiling, what it must tolerate, and what it must not let pass."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.nn import functional

from apps.commands.evaluate import shares
from apps.stickers import COLOURS, STARTER, Placement, Scene, SceneSampler, load_sprites, render
from apps.stickers.judge import Found, Judge, Reading, emptiest_line, score

SHEET = load_sprites()
SCENES = [SceneSampler(SHEET, STARTER, split="all").scene(11, i) for i in range(192)]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(SHEET)


def test_ceiling_on_clean_renders(judge: Judge) -> None:
    found = shares(SCENES, [render(SCENES, SHEET)], judge)
    assert set(found) == {"colour", "recall", "relation", "count", "count_strict"}
    assert min(found.values()) >= 0.98, found


def test_blur_and_noise_do_not_mislead(judge: Judge) -> None:
    scenes, noise = SCENES[:96], torch.Generator().manual_seed(0)
    small = functional.interpolate(render(scenes, SHEET), size=48, mode="bilinear", antialias=True)
    blotches = functional.interpolate(torch.randn(96, 3, 32, 32, generator=noise), size=128, mode="bilinear")
    pictures = functional.interpolate(small, size=128, mode="bilinear") + 0.06 * blotches
    found = shares(scenes, [pictures.clamp(-1, 1)], judge)
    assert min(found.values()) >= 0.93, found


def test_places_and_sizes_are_read_exactly(judge: Judge) -> None:
    scenes = [scene for scene in SCENES[:64] if scene.kind != "count"]
    for scene, reading in zip(scenes, judge.read(render(scenes, SHEET)), strict=True):
        found = {one.sprite: one for one in reading.objects}
        for place in scene.placements:
            one = found[place.sprite]
            off = torch.tensor([one.x - place.x, one.y - place.y, one.size - place.size]).abs().max()
            assert off < 0.012, (scene, reading)


def test_empty_and_senseless_pictures_hold_nothing_that_was_asked_for(judge: Judge) -> None:
    noise = torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for reading in judge.read(noise):
        assert not reading.objects or reading.error > 0.8
    plain = torch.full((1, 3, 128, 128), 1.0)
    assert judge.read(plain) == [Reading(COLOURS.index("white"), (), 0.0)]


def test_all_backgrounds_are_read_under_large_stickers(judge: Judge) -> None:
    sprite = SHEET.index("pizza")
    scenes = [Scene("single", (Placement(sprite, 0.5, 0.5, 0.95),), colour, (sprite,)) for colour in range(10)]
    readings = judge.read(render(scenes, SHEET))
    assert [reading.background for reading in readings] == list(range(10))
    assert all(score(scene, reading)["recall"] for scene, reading in zip(scenes, readings, strict=True))


def test_pillow_pictures_and_other_sizes_are_read_alike(judge: Judge) -> None:
    scenes = SCENES[:6]
    levels = ((render(scenes, SHEET, 256) + 1) * 127.5).round().to(torch.uint8)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in levels]
    readings = judge.read(pictures)
    for scene, reading in zip(scenes, readings, strict=True):
        assert all(score(scene, reading).values())


def test_readings_do_not_depend_on_the_batch(judge: Judge) -> None:
    pictures = render(SCENES[:6], SHEET)
    together, alone = judge.read(pictures), [judge.read(one[None])[0] for one in pictures]
    assert [[o.sprite for o in r.objects] for r in together] == [[o.sprite for o in r.objects] for r in alone]
    assert [r.background for r in together] == [r.background for r in alone]


def found(sprite: int, x: float, y: float) -> Found:
    return Found(sprite, x, y, 0.45, 0.0)


def test_scores_of_pairs() -> None:
    scene = Scene("pair", (), 2, (5, 9), "left of", count=2)
    right = Reading(2, (found(5, 0.25, 0.5), found(9, 0.75, 0.5)), 0.0)
    assert score(scene, right) == {"colour": True, "relation": True}
    assert score(replace(scene, background=1), right)["colour"] is False
    swapped = Reading(2, (found(9, 0.25, 0.5), found(5, 0.75, 0.5)), 0.0)
    stacked = Reading(2, (found(5, 0.45, 0.25), found(9, 0.55, 0.75)), 0.0)
    other = Reading(2, (found(5, 0.25, 0.5), found(8, 0.75, 0.5)), 0.0)
    twice = Reading(2, (found(5, 0.25, 0.5), found(5, 0.75, 0.5)), 0.0)
    three = Reading(2, (*right.objects, found(5, 0.5, 0.9)), 0.0)
    for wrong in (swapped, stacked, other, twice, three):
        assert score(scene, wrong)["relation"] is False
    assert score(replace(scene, relation="above"), stacked)["relation"] is True
    assert score(replace(scene, relation="right of"), swapped)["relation"] is True


def test_scores_of_singles_and_counts() -> None:
    single = Scene("single", (), 0, (5,))
    assert score(single, Reading(0, (found(5, 0.5, 0.5),), 0.0))["recall"] is True
    assert score(single, Reading(0, (found(6, 0.5, 0.5),), 0.0))["recall"] is False
    assert score(single, Reading(0, (found(5, 0.3, 0.5), found(5, 0.7, 0.5)), 0.0))["recall"] is False
    count = Scene("count", (), 0, (5,), count=2)
    right = score(count, Reading(0, (found(5, 0.3, 0.5), found(5, 0.7, 0.5)), 0.0))
    assert right["count"] is True
    assert right["count_strict"] is True
    mixed = score(count, Reading(0, (found(5, 0.3, 0.5), found(6, 0.7, 0.5)), 0.0))
    assert mixed["count"] is True
    assert mixed["count_strict"] is False


def test_cuts_go_through_gaps_near_the_middle() -> None:
    profile = torch.ones(2, 64)
    profile[0, 28:30] = 0.0  # a gap left of the middle
    profile[1, 4:20] = 0.0  # a gap too far from it
    assert emptiest_line(profile).tolist()[0] == 29
    assert abs(emptiest_line(profile).tolist()[1] - 32) <= 7


def test_wrong_shapes_are_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match="give \\(B, 3, H, H\\)"):
        judge.read(torch.zeros(1, 3, 64, 32))
