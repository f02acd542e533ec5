"""Rendered clips: the two ways to sample agree, tracks are followed, any length and size is drawn."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from apps.stickers import BACKGROUNDS, COLOURS
from apps.stickers.moving import ClipScene, ClipSceneSampler, MovingSticker, Pose, load_clips, render_clip
from apps.stickers.moving.clips import SIDE
from apps.stickers.moving.renderer import draw_frames, poses
from apps.stickers.renderer import premultiplied

SHEET = load_clips()
PICTURES = premultiplied(SHEET.pixels[SHEET.index("dolphin"), :2])  # (2, 4, 72, 72)


def scene_of(name: str, own: str, start: Pose, end: Pose | None = None) -> ClipScene:
    sticker = MovingSticker(SHEET.index(name), own, start, end or start)  # type: ignore[arg-type]
    return ClipScene("single", (sticker,), COLOURS.index("blue"), "stays")


def test_a_sticker_of_its_own_size_is_drawn_as_stored() -> None:
    drawn = draw_frames(PICTURES, torch.tensor([[0.5, 0.5, 1.0, 0.0]] * 2), SIDE)
    torch.testing.assert_close(drawn, PICTURES, atol=1e-5, rtol=0)


@pytest.mark.parametrize("resolution", [64, 96])
def test_both_ways_to_sample_agree(resolution: int) -> None:
    """The smallest turn changes the sampling, but not the image."""
    upright = torch.tensor([[0.45, 0.55, 0.6, 0.0]] * 2)
    turned = upright + torch.tensor([0.0, 0.0, 0.0, 1e-3])
    difference = draw_frames(PICTURES, upright, resolution) - draw_frames(PICTURES, turned, resolution)
    assert difference.square().mean().sqrt() < 0.015


def test_a_quarter_turn_is_clockwise() -> None:
    place = torch.tensor([[0.5, 0.5, 0.6, 90.0]] * 2)
    upright = draw_frames(PICTURES, place * torch.tensor([1, 1, 1, 1e-6]), 64)
    turned = draw_frames(PICTURES, place, 64)
    torch.testing.assert_close(turned, upright.rot90(-1, (2, 3)), atol=1e-3, rtol=0)


def test_tracks_are_followed() -> None:
    scene = scene_of("dolphin", "still", Pose(0.3, 0.5, 0.4), Pose(0.7, 0.5, 0.4))
    clip = render_clip(scene, SHEET, 5, 80)  # (5, 3, 80, 80): 8 pixels from frame to frame
    assert clip.shape == (5, 3, 80, 80)
    assert clip.dtype == torch.float32
    for frame in range(4):
        torch.testing.assert_close(clip[frame][..., :-8], clip[frame + 1][..., 8:], atol=1e-4, rtol=0)
    sizes = [
        pose.size for pose in poses(scene_of("fox", "still", Pose(0.5, 0.5, 0.2), Pose(0.5, 0.5, 0.8)).stickers[0], 3)
    ]
    assert sizes == pytest.approx([0.2, 0.4, 0.8])


def test_own_motions_are_played_as_they_say() -> None:
    place = Pose(0.5, 0.5, 0.7)
    played = {
        own: render_clip(scene_of("dolphin", own, place), SHEET, 16, 48) for own in ("animated", "still", "backwards")
    }
    assert torch.equal(played["still"], played["still"][:1].expand(16, -1, -1, -1))
    assert torch.equal(played["animated"].flip(0), played["backwards"])
    assert torch.equal(played["animated"][0], played["still"][0])
    slow = render_clip(scene_of("dolphin", "slow", place), SHEET, 32, 48)
    assert torch.equal(slow[::2], played["animated"])
    fast = render_clip(scene_of("dolphin", "fast", place), SHEET, 8, 48)
    assert torch.equal(fast, played["animated"][::2])
    assert torch.equal(render_clip(scene_of("dolphin", "animated", place), SHEET, 8, 48, period=8), fast)
    longer = render_clip(scene_of("dolphin", "animated", place), SHEET, 20, 48)
    assert torch.equal(longer[16:], played["animated"][:4])


def test_background_is_exact_and_range_is_kept() -> None:
    sampler = ClipSceneSampler(SHEET)
    for i in range(6):
        scene = sampler.scene(2, i)
        clip = render_clip(scene, SHEET, 3, 64)
        assert clip.min() >= -1 - 1e-5
        assert clip.max() <= 1 + 1e-5
    plain = render_clip(scene_of("fox", "animated", Pose(0.5, 0.5, 0.5, 30.0)), SHEET, 2, 64)
    expected = torch.tensor(BACKGROUNDS["blue"]) / 127.5 - 1
    torch.testing.assert_close(plain[:, :, 0, 0], expected.expand(2, -1))


@pytest.mark.parametrize("angle", [0.0, 40.0])
def test_a_larger_canvas_shows_the_same_clip(angle: float) -> None:
    scene = scene_of("lobster", "animated", Pose(0.5, 0.5, 0.6, angle))
    small = render_clip(scene, SHEET, 2, 64)
    large = functional.avg_pool2d(render_clip(scene, SHEET, 2, 256), 4)
    assert (small - large).square().mean().sqrt() < 0.06


def test_a_single_frame_shows_the_start() -> None:
    scene = scene_of("fox", "animated", Pose(0.3, 0.5, 0.4), Pose(0.7, 0.5, 0.4))
    held = replace(scene, stickers=(replace(scene.stickers[0], end=scene.stickers[0].start),))
    assert torch.equal(render_clip(scene, SHEET, 1, 48), render_clip(held, SHEET, 1, 48))


def test_wrong_sizes_are_refused() -> None:
    scene = scene_of("fox", "animated", Pose(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="resolution is 0"):
        render_clip(scene, SHEET, 2, 0)
    with pytest.raises(ValueError, match="num_frames is 0"):
        render_clip(scene, SHEET, 0)
