"""What a transformer is shown of a clip that is known in part."""

import torch

from pipelines.inputs.known_clip import KnownClip
from pipelines.inputs.known_latents import frames_shown, known_latents


def frames(*known: int, count: int) -> torch.Tensor:
    """Return which of `count` frames are known, (T, 1, 1)."""
    flags = torch.zeros(count, 1, 1, dtype=torch.bool)
    flags[list(known)] = True
    return flags


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """Return the mean of each group of a first frame and then 2, in cells of 2 x 2 pixels."""
    pixels = torch.nn.functional.avg_pool3d(pixels, (1, 2, 2))
    first, rest = pixels[:, :, :1], pixels[:, :, 1:]
    return torch.cat([first, rest.unflatten(2, (-1, 2)).mean(dim=3)], dim=2)


def test_all_frames_of_a_group_are_shown_or_the_last_known_one():
    shown = frames_shown(frames(0, 1, 2, 3, 4, 6, 7, 13, count=14), 4)[..., 0, 0]  # (R, T')
    expected = [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]  # the last group holds one frame
    assert shown.T.int().tolist() == expected
    assert frames_shown(frames(1, count=3), 1)[..., 0, 0].tolist() == [[False, True, False]]


def test_known_groups_are_encoded_as_they_are_and_others_stand_still():
    pixels = torch.arange(7.0)[None, None, :, None, None].expand(1, 3, 7, 4, 4)
    mask = torch.ones(7, 1, 4, 4, dtype=torch.bool)
    mask[[0, 1, 2, 3]] = False
    noise = torch.full((1, 3, 4, 2, 2), 9.0)
    known = known_latents(KnownClip(pixels, mask), noise, 2, encode)
    # groups: 0; 1 and 2; 3 and (unknown) 4; 5 and 6, of which nothing is known
    assert known.latents[0, 0, :, 0, 0].tolist() == [0.0, 1.5, 3.0, 0.0]
    assert known.shown[0, :, :, 0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert known.beside(noise).shape == (1, 3 + 2 + 3, 4, 2, 2)
    blended = known.blend(torch.full_like(noise, 5.0), 0.5)[0, 0, :, 0, 0]
    assert blended.tolist() == [4.5, 5.25, 5.0, 5.0]  # only what is wholly known is replaced


def test_cells_are_known_only_if_all_their_pixels_are():
    pixels = torch.rand(1, 3, 3, 4, 4)
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 1, 1] = True  # one pixel of the upper left cell
    mask[2, :, :, 2:] = True  # the right half of the last frame
    known = known_latents(KnownClip(pixels, mask), torch.zeros(1, 3, 2, 2, 2), 2, encode)
    assert known.shown[0, :, 0, :, :].all(0).tolist() == [[False, True], [True, True]]
    assert known.shown[0, :, 1].int().tolist() == [[[0, 1], [1, 1]], [[0, 0], [1, 0]]]
    assert torch.allclose(known.latents[0, :, 1, 1, 1], pixels[0, :, 1, 2:, 2:].mean(dim=(-2, -1)))
    assert (known.latents[0, :, :, 0, 0] == 0).all()


def test_nothing_known_is_not_encoded():
    def refuse(pixels: torch.Tensor) -> torch.Tensor:
        raise AssertionError("there is nothing to encode")

    known = known_latents(KnownClip.nothing(1, 5, 4, 4), torch.ones(1, 3, 2, 2, 2), 4, refuse)
    assert not known.shown.any()
    assert not known.latents.any()
