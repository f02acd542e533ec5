"""The sheet of moving stickers: what it holds, how it is played, and how motion is measured."""

import json

import pytest
import torch

from apps.stickers.moving import OWN_MOTIONS, load_clips, source_frames
from apps.stickers.moving.clips import LENGTH, SIDE
from apps.stickers.moving.measure import measure
from apps.stickers.sprites import DATA

SHEET = load_clips()


def test_names_are_those_of_still_stickers_and_unique() -> None:
    still = {row["name"] for row in json.loads((DATA / "names.json").read_text(encoding="ascii"))}
    assert len(SHEET) == len(set(SHEET.names)) == 128
    assert set(SHEET.names) <= still
    others = [name for also in SHEET.also for name in also]
    assert len(others) == len(set(others)) > 30
    assert not set(others) & set(SHEET.names)


def test_words_are_those_written_by_hand_and_plain() -> None:
    words = json.loads((DATA / "verbs.json").read_text(encoding="ascii"))
    assert [row["name"] for row in words] == list(SHEET.names)
    assert [row["verb"] for row in words] == list(SHEET.verbs)
    for verb in SHEET.verbs:
        assert verb == verb.lower()
        assert 1 <= len(verb.split()) <= 4
        assert verb.split()[0].endswith("ing")


def test_every_clip_moves_and_is_clean_where_nothing_is() -> None:
    assert SHEET.pixels.shape == (128, LENGTH, 4, SIDE, SIDE)
    alpha = SHEET.pixels[:, :, 3]
    assert set(SHEET.pixels[0, 0, 3].unique().tolist()) >= {0, 255}
    assert int(((alpha > 0) & (alpha < 8)).sum()) < alpha.numel() // 1000
    table = json.loads((DATA / "clips.json").read_text(encoding="ascii"))
    assert min(row["change"] for row in table) > 0.015
    boxes = alpha.amax(1) > 8  # (C, S, S): visible in any frame
    spans = [(box.any(0).nonzero().flatten(), box.any(1).nonzero().flatten()) for box in boxes]
    for across, down in spans:
        width, height = int(across[-1] - across[0]) + 1, int(down[-1] - down[0]) + 1
        assert max(width, height) >= SIDE - 2
        assert abs(int(across[0] + across[-1]) - SIDE + 1) <= 3
        assert abs(int(down[0] + down[-1]) - SIDE + 1) <= 3


def test_the_sheet_stays_small() -> None:
    assert (DATA / "clips.webp").stat().st_size + (DATA / "clips.json").stat().st_size < 4_500_000


def test_every_clip_can_be_played_and_held() -> None:
    for motions in SHEET.motions:
        assert set(motions) <= set(OWN_MOTIONS)
        assert {"animated", "still"} <= set(motions)


def test_ways_to_play_a_clip() -> None:
    assert source_frames("animated", True, 20) == [*range(16), 0, 1, 2, 3]
    assert source_frames("animated", False, 20) == [*range(16), 14, 13, 12, 11]
    assert source_frames("still", True, 3) == [0, 0, 0]
    assert source_frames("slow", True, 6) == [0, 0, 1, 1, 2, 2]
    assert source_frames("fast", True, 9) == [0, 2, 4, 6, 8, 10, 12, 14, 0]
    assert source_frames("backwards", True, 17) == [*range(15, -1, -1), 15]
    assert source_frames("backwards", False, 18) == [*range(15, -1, -1), 1, 2]
    assert source_frames("animated", True, 8, period=8) == list(range(0, 16, 2))


def test_unknown_ways_and_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="animated, still"):
        source_frames("dancing", True, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_frames is 0"):
        source_frames("slow", True, 0)
    with pytest.raises(KeyError, match="person running"):
        SHEET.index("person walking fast")


def bars(angles: list[float], shift: float = 0.0, size: float = 1.0) -> torch.Tensor:
    """A clip of a pink bar with a heavy end that turns by degrees, moves to the right and grows."""
    place = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    frames = torch.zeros(len(angles), 4, SIDE, SIDE, dtype=torch.uint8)
    for i, angle in enumerate(torch.tensor(angles).deg2rad()):
        part, scale = i / (len(angles) - 1), 1 + (size - 1) * i / (len(angles) - 1)
        x, y = (place[None] - shift * part) / scale, place[:, None] / scale
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        inside = (along > -0.2) & (along < 0.3) & (across.abs() < torch.where(along > 0.1, 0.15, 0.05))
        frames[i, :, inside] = torch.tensor([255, 100, 150, 255], dtype=torch.uint8)[:, None]
    return frames


def test_measured_motion_is_that_of_known_clips() -> None:
    turning = measure(bars([i * 10.0 for i in range(16)]))
    assert turning.rotation == pytest.approx(150, abs=10)
    assert not turning.turnable
    assert measure(bars([-i * 10.0 for i in range(16)])).rotation == pytest.approx(-150, abs=10)
    moving = measure(bars([0.0] * 16, shift=12 / SIDE))
    assert moving.shift == pytest.approx(12 / SIDE, abs=0.005)
    assert moving.turnable
    assert not moving.loops
    growth = measure(bars([0.0] * 16, size=1.4)).growth
    assert growth == pytest.approx(1.4**2, abs=0.2)  # the edges of the bar are whole pixels
    held = measure(bars([0.0] * 16))
    assert held.change == 0
    assert held.motions == ("animated",)


def test_a_swing_is_the_same_backwards() -> None:
    """A clip that goes to and fro evenly can't be told from its reverse; one that turns on can."""
    swing = [40.0 * (1 - abs(i - 7.5) / 7.5) for i in range(16)]
    assert "backwards" not in measure(bars(swing)).motions
    assert "backwards" in measure(bars([i * 10.0 for i in range(16)])).motions
