"""Masks of space and time: what each maker generates, their algebra, their text, and the latent cells they touch."""

import pytest
import torch

from pipelines import VideoMask
from pipelines.inputs.video_mask import MAX_TEXT

SIZE = (6, 8, 10)


def generated_frames(mask: VideoMask, num_frames: int = 6) -> list[int]:
    """Return the frames that are generated in full; all others must be known in full."""
    found = mask.resolve(num_frames, 8, 10)
    assert found.shape == (num_frames, 1, 8, 10)
    whole, none = found.flatten(1).all(dim=1), ~found.flatten(1).any(dim=1)
    assert bool((whole | none).all())
    return whole.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("mask", "frames"),
    [
        (VideoMask.generate(), [0, 1, 2, 3, 4, 5]),
        (VideoMask.predict(2), [2, 3, 4, 5]),
        (VideoMask.backward(2), [0, 1, 2, 3]),
        (VideoMask.interpolate(4), [1, 2, 3]),
        (VideoMask.interpolate(3), [1, 2, 4]),
        (VideoMask.keyframes(0), [1, 2, 3, 4, 5]),
        (VideoMask.keyframes(0, -1), [1, 2, 3, 4]),
        (VideoMask.predict(2) & VideoMask.backward(1), [2, 3, 4]),
        (VideoMask.predict(5) | VideoMask.backward(5), [0, 5]),
        (~VideoMask.predict(2), [0, 1]),
    ],
    ids=str,
)
def test_whole_frames(mask, frames):
    assert generated_frames(mask) == frames
    assert torch.equal(VideoMask.parse(str(mask)).resolve(*SIZE), mask.resolve(*SIZE))


def test_boxes_margins_and_mask_clips():
    box = VideoMask.box(0.5, 0.25, 1, 0.75, 0.5, 1).resolve(*SIZE)
    assert box.sum() == 3 * 4 * 5
    assert bool(box[3:, :, 2:6, 5:].all())
    margins = VideoMask.outpaint(left=0.2, bottom=0.25).resolve(*SIZE)
    assert bool(margins[:, :, :, :2].all() and margins[:, :, 6:].all())
    assert not margins[:, :, :6, 2:].any()
    clip = torch.zeros(6, 4, 5)
    clip[2, 1, 1] = 1
    assert torch.equal(VideoMask.inpaint(clip).resolve(*SIZE).nonzero()[:, 0].unique(), torch.tensor([2]))
    assert VideoMask.inpaint(clip).resolve(*SIZE).sum() == 4
    assert VideoMask.inpaint(clip[2]).resolve(*SIZE).sum() == 6 * 4
    assert VideoMask.box(0.5, 0.5, 0.501, 0.501).resolve(*SIZE).sum() == 6  # at least a pixel


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("predict(0)", "expected at least 1"),
        ("predict(1.5)", "whole numbers"),
        ("predict()", "expected generate"),
        ("predict(1, 2)", "expected generate"),
        ("predict(known=2)", "can't be read"),
        ("interpolate(1)", "expected at least 2"),
        ("keyframes()", "names no frame"),
        ("box(0.5, 0, 0.5, 1)", "left, right of a box"),
        ("box(True, 0, 1, 1)", "must be numbers"),
        ("outpaint(0.5, 0, 0.5, 0)", "known middle"),
        ("outpaint()", "above 0"),
        ("inpaint(1)", "can't be read"),
        ("resolve(1, 2, 3)", "can't be read"),
        ("__import__('os')", "can't be read"),
        ("predict(2) + predict(3)", "can't be read"),
        ("predict('2')", "must be numbers"),
        ("", "can't be read"),
        ("predict(2", "can't be read"),
        ("~" * 60 + "predict(2)", "nested deeper"),
        ("~" * MAX_TEXT + "predict(2)", "at most 400"),
    ],
)
def test_text_of_strangers_is_refused_with_the_reason(text, problem):
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        VideoMask.parse(text)


def test_large_numbers_of_strangers_stay_as_they_are():
    assert str(VideoMask.parse("keyframes(1234567)")) == "keyframes(1234567)"
    huge = "1" + 350 * "0"
    with pytest.raises(ValueError, match="leaves none to generate"):
        VideoMask.parse(f"predict({huge})").resolve(*SIZE)
    with pytest.raises(ValueError, match="whole numbers"):
        VideoMask.parse("predict(1e999)")
    assert str(VideoMask.parse("box(0.1234567891, 0, 1, 1)")) == "box(0.1234567891, 0, 1, 1, 0.0, 1.0)"


def test_a_mask_that_does_not_fit_a_clip_says_so():
    with pytest.raises(ValueError, match="leaves none to generate: at most 5"):
        VideoMask.predict(6).resolve(*SIZE)
    with pytest.raises(ValueError, match="names frame 6 of a clip of 6: expected -6 to 5"):
        VideoMask.keyframes(6).resolve(*SIZE)
    with pytest.raises(ValueError, match="has 3 frames, the clip 6"):
        VideoMask.inpaint(torch.ones(3, 4, 4)).resolve(*SIZE)
    with pytest.raises(ValueError, match=r"values in \[0, 1\]"):
        VideoMask.inpaint(torch.full((3, 4, 4), 255.0))
