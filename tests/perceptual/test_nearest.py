"""The judge by nearest neighbours: recall on fresh renderings, empty images, what it refuses."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from apps.perceptual import NearestStickerJudge
from apps.perceptual.nearest import cut_out
from apps.stickers import SceneMix, SceneSampler, SpriteSheet, load_sprites, render


@pytest.fixture(scope="module")
def sheet() -> SpriteSheet:
    """Every twelfth sticker: 123, of which the references take a second."""
    whole = load_sprites()
    return SpriteSheet(whole.names[::12], whole.keywords[::12], whole.pixels[::12])


@pytest.fixture(scope="module")
def judge(sheet: SpriteSheet) -> NearestStickerJudge:
    return NearestStickerJudge(sheet)


@pytest.fixture(scope="module")
def drawn(sheet: SpriteSheet) -> tuple[Tensor, list[int]]:
    """32 single stickers of random place, size and background, and which they are."""
    sampler = SceneSampler(sheet, split="all", mix=SceneMix(pair=0, count=0))
    scenes = [sampler.scene(3, index) for index in range(32)]
    return render(scenes, sheet, 128), [scene.sprites[0] for scene in scenes]


def test_recall_on_fresh_renderings(judge: NearestStickerJudge, drawn: tuple[Tensor, list[int]]) -> None:
    images, truth = drawn
    read = judge.read(images, batch_size=10)
    assert read.sprites.tolist() == truth
    assert read.similarity.mean() > 0.9


def test_recall_on_blurred_renderings(judge: NearestStickerJudge, drawn: tuple[Tensor, list[int]]) -> None:
    images, truth = drawn
    blurred = functional.avg_pool2d(functional.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    read = judge.read(blurred)
    assert sum(a == b for a, b in zip(read.sprites.tolist(), truth, strict=True)) >= 31
    assert read.similarity.mean() < judge.read(images).similarity.mean()


def test_an_empty_image_holds_nothing(judge: NearestStickerJudge) -> None:
    read = judge.read(torch.full((2, 3, 64, 64), 0.3))
    assert read.sprites.tolist() == [-1, -1]
    assert read.similarity.tolist() == [0, 0]


def test_the_cut_out_does_not_depend_on_place_and_ground() -> None:
    """A white bar with a black dot, at two places of two sizes of canvas and on two colours."""
    cuts = []
    for side, left, ground in ((64, 8, -0.4), (96, 40, 0.5)):
        image = torch.full((1, 3, side, side), ground)
        image[:, 1:] -= 0.3
        image[..., left : left + 24, left : left + 16] = 1
        image[..., left + 8 : left + 12, left + 4 : left + 8] = -1
        objects, seen = cut_out(image)
        assert seen.all()
        cuts.append(objects)
    torch.testing.assert_close(cuts[0], cuts[1], rtol=0, atol=0.02)
    assert cuts[0][0, :, 32, 2].tolist() == pytest.approx([0, 0, 0], abs=0.01)


def test_other_shapes_are_refused(judge: NearestStickerJudge) -> None:
    with pytest.raises(ValueError, match=r"give \(B, 3, H, H\)"):
        judge.read(torch.zeros(1, 3, 64, 32))
