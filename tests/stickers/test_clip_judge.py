"""The judge of clips: its ceiling on a few renderings, what it reads exactly, and what it must not let pass."""

from dataclasses import replace

import pytest
import torch

from apps.stickers import COLOURS
from apps.stickers.moving import (
    ClipJudge,
    ClipReading,
    ClipScene,
    MovingSticker,
    Pose,
    clip_ceiling,
    load_clips,
    render_clip,
    score_clip,
)
from apps.stickers.moving.judge import ReadSticker, scene_motion
from apps.stickers.moving.playback import OWN_MOTIONS

SHEET = load_clips()
RED = COLOURS.index("red")


@pytest.fixture(scope="module")
def judge() -> ClipJudge:
    return ClipJudge(SHEET)


def single(name: str, own: str, motion: str, start: Pose, end: Pose) -> ClipScene:
    sticker = MovingSticker(SHEET.index(name), own, start, end)  # type: ignore[arg-type]
    return ClipScene("single", (sticker,), RED, motion)  # type: ignore[arg-type]


LEFT = single("dolphin", "animated", "left", Pose(0.72, 0.5, 0.5), Pose(0.28, 0.5, 0.5))
TURNED = single("crab", "backwards", "clockwise", Pose(0.5, 0.5, 0.6), Pose(0.5, 0.5, 0.6, 180.0))
STILL = single("turtle", "still", "grows", Pose(0.5, 0.5, 0.38), Pose(0.5, 0.5, 0.8))
STAYS = single("butterfly", "slow", "stays", Pose(0.5, 0.5, 0.7), Pose(0.5, 0.5, 0.7))
PASSING = ClipScene(
    "passing",
    (
        MovingSticker(SHEET.index("lobster"), "animated", Pose(0.3, 0.26, 0.43), Pose(0.7, 0.26, 0.43)),
        MovingSticker(SHEET.index("penguin"), "animated", Pose(0.7, 0.74, 0.43), Pose(0.3, 0.74, 0.43)),
    ),
    RED,
    "right",
    "above",
)


@pytest.fixture(scope="module")
def readings(judge: ClipJudge) -> dict[str, ClipReading]:
    scenes = {"left": LEFT, "turned": TURNED, "still": STILL, "stays": STAYS, "passing": PASSING}
    clips = torch.stack([render_clip(scene, SHEET) for scene in scenes.values()])
    return dict(zip(scenes, judge.read(clips), strict=True))


def test_renderings_are_read_as_they_were_meant(readings: dict[str, ClipReading]) -> None:
    scenes = {"left": LEFT, "turned": TURNED, "still": STILL, "stays": STAYS, "passing": PASSING}
    for name, scene in scenes.items():
        assert all(score_clip(scene, readings[name]).values()), (name, readings[name])


def test_tracks_are_read_exactly_and_in_pixels(readings: dict[str, ClipReading]) -> None:
    for name, scene in (("left", LEFT), ("still", STILL), ("turned", TURNED)):
        sticker, read = scene.stickers[0], readings[name].stickers[0]
        assert len(read.track) == 16
        for wanted, found in ((sticker.start, read.track[0]), (sticker.end, read.track[-1])):
            exact = (wanted.x * 96, wanted.y * 96, wanted.size * 96)
            assert found[:3] == pytest.approx(exact, abs=1.5)
            assert found.angle == pytest.approx(wanted.angle, abs=4)
        assert read.roughness < 0.5
        assert read.error < 0.02


def test_motion_explains_the_change_of_a_rendering_not_blinking(
    judge: ClipJudge, readings: dict[str, ClipReading]
) -> None:
    clip = render_clip(LEFT, SHEET)
    assert readings["left"].unexplained < 0.005
    assert readings["left"].flicker > 2 * readings["left"].unexplained
    blinking = clip + 0.1 * torch.tensor([1.0, -1.0]).repeat(8)[:, None, None, None]
    blinking = blinking.clamp(-1, 1)
    reading = judge.read(blinking[None])[0]
    assert reading.unexplained > 0.05
    assert reading.flicker == pytest.approx(float((blinking[1:] - blinking[:-1]).abs().mean()) / 2, rel=1e-5)


def test_a_jumping_sticker_has_a_rough_track(judge: ClipJudge) -> None:
    clip = render_clip(replace(LEFT, stickers=(replace(LEFT.stickers[0], end=LEFT.stickers[0].start),)), SHEET)
    shaken = torch.stack([frame.roll(3 * (i % 2), 2) for i, frame in enumerate(clip)])
    assert judge.read(shaken[None])[0].stickers[0].roughness > 4


def test_empty_clips_hold_nothing(judge: ClipJudge) -> None:
    reading = judge.read(torch.full((1, 4, 3, 64, 64), 1.0))[0]
    assert reading == ClipReading(COLOURS.index("white"), (), 0.0, 0.0)
    assert not score_clip(LEFT, reading)["identity"]


def test_the_ceiling_is_reported(judge: ClipJudge) -> None:
    report = clip_ceiling(4, 64, noise=0.05, blur=2, sheet=SHEET, judge=judge)
    assert set(report) == {"colour", "identity", "motion", "plays", "own", "all"}
    assert report["colour"] == 1
    assert report["identity"] >= 0.75
    with pytest.raises(ValueError, match="num_prompts is 0"):
        clip_ceiling(0)
    with pytest.raises(ValueError, match="blur from 1 to 96"):
        clip_ceiling(1, blur=0)


def read_sticker(clip: int, own: str = "animated", motion: str = "left", y: float = 20.0) -> ReadSticker:
    track = (Pose(60.0, y, 30.0), Pose(20.0, y, 30.0))
    ways = {way: 0.2 if way == own else 0.5 + 0.1 * number for number, way in enumerate(OWN_MOTIONS)}
    return ReadSticker(clip, 1.0, own, motion, track, 0.0, 0.0, ways)  # type: ignore[arg-type]


def test_scores_of_singles() -> None:
    dolphin = LEFT.stickers[0].clip
    right = ClipReading(RED, (read_sticker(dolphin),), 0.0, 0.0)
    assert all(score_clip(LEFT, right).values())
    still = score_clip(LEFT, replace(right, stickers=(read_sticker(dolphin, own="still"),)))
    assert still == {
        "colour": True, "identity": True, "motion": True, "plays": False, "own": False, "all": False,
    }  # fmt: skip
    fast = score_clip(LEFT, replace(right, stickers=(read_sticker(dolphin, own="fast"),)))
    assert (fast["plays"], fast["own"], fast["all"]) == (True, False, False)  # nearer to its own pace than to standing
    other = score_clip(LEFT, replace(right, stickers=(read_sticker(dolphin + 1),)))
    assert (other["identity"], other["motion"], other["own"]) == (False, True, False)
    two = score_clip(LEFT, replace(right, stickers=(read_sticker(dolphin), read_sticker(dolphin))))
    assert (two["identity"], two["motion"]) == (False, False)
    assert not score_clip(LEFT, replace(right, background=RED + 1))["colour"]


def test_scores_of_pairs() -> None:
    lobster, penguin = (sticker.clip for sticker in PASSING.stickers)
    top, bottom = read_sticker(lobster, motion="right"), read_sticker(penguin, motion="left", y=70.0)
    assert all(score_clip(PASSING, ClipReading(RED, (top, bottom), 0.0, 0.0)).values())
    swapped = (read_sticker(penguin, motion="left"), read_sticker(lobster, motion="right", y=70.0))
    scores = score_clip(PASSING, ClipReading(RED, swapped, 0.0, 0.0))
    assert (scores["identity"], scores["motion"]) == (True, False)
    same_way = (top, replace(bottom, motion="right"))
    assert not score_clip(PASSING, ClipReading(RED, same_way, 0.0, 0.0))["motion"]
    assert not score_clip(PASSING, ClipReading(RED, (top,), 0.0, 0.0))["motion"]


def test_scene_motions_are_named_by_their_strongest_part() -> None:
    named = {
        (0.0, 0.0, 0.0, 0.0): "stays",
        (0.05, 0.05, 0.1, 10.0): "stays",
        (-0.4, 0.1, 0.1, 0.0): "left",
        (0.1, 0.4, 0.0, 0.0): "down",
        (0.1, 0.0, 0.7, 0.0): "grows",
        (0.0, 0.1, -0.7, 20.0): "shrinks",
        (0.1, 0.0, 0.0, -170.0): "anticlockwise",
    }
    assert {change: scene_motion(torch.tensor(change)) for change in named} == named


def test_wrong_shapes_are_refused(judge: ClipJudge) -> None:
    for shape in ((1, 4, 3, 64, 32), (4, 3, 64, 64), (1, 1, 3, 64, 64)):
        with pytest.raises(ValueError, match="give \\(B, T, 3, H, H\\)"):
            judge.read(torch.zeros(shape))
