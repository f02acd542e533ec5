"""The batched renderer against a slow one that works pixel by pixel, and against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from apps.stickers import BACKGROUNDS, COLOURS, STARTER, Placement, Scene, SceneSampler, load_sprites, render

SHEET = load_sprites()
SCENES = [SceneSampler(SHEET, STARTER, split="all").scene(3, i) for i in range(12)]


def triangle(position: float, radius: float, count: int) -> list[tuple[int, float]]:
    """The samples near a position and their weights, as if zeros went on beyond both ends."""
    first, last = int(np.floor(position - radius - 0.5)), int(np.ceil(position + radius + 0.5))
    weights = {j: max(0.0, 1 - abs(position - (j + 0.5)) / radius) for j in range(first, last + 1)}
    total = sum(weights.values())
    return [(j, weight / total) for j, weight in weights.items() if 0 <= j < count and weight > 0]


def render_slowly(scene: Scene, side: int) -> np.ndarray:
    """One pixel after the other: a triangle filter over the sprite, or over its halves while those are big enough."""
    background = np.array(BACKGROUNDS[COLOURS[scene.background]]) / 255
    picture = np.tile(background, (side, side, 1))
    for place in scene.placements:
        sprite = SHEET.pixels[place.sprite].numpy().transpose(1, 2, 0) / 255
        sprite = np.concatenate([sprite[..., :3] * sprite[..., 3:], sprite[..., 3:]], axis=-1)
        size = place.size * side
        while len(sprite) >= 2 * size:
            sprite = (sprite[::2, ::2] + sprite[1::2, ::2] + sprite[::2, 1::2] + sprite[1::2, 1::2]) / 4
        scale = len(sprite) / size
        for row in range(side):
            for column in range(side):
                down = (row + 0.5 - (place.y * side - size / 2)) * scale
                across = (column + 0.5 - (place.x * side - size / 2)) * scale
                value = np.zeros(4)
                for j, weight in triangle(down, max(1.0, scale), len(sprite)):
                    for i, other in triangle(across, max(1.0, scale), len(sprite)):
                        value += weight * other * sprite[j, i]
                picture[row, column] = value[:3] + picture[row, column] * (1 - value[3])
    return picture


def test_equals_the_slow_renderer() -> None:
    chosen = [next(s for s in SCENES if s.kind == kind) for kind in ("single", "pair", "count")]
    fast = (render(chosen, SHEET, 32) + 1) / 2  # (3, 3, 32, 32)
    for scene, picture in zip(chosen, fast, strict=True):
        slow = render_slowly(scene, 32)
        np.testing.assert_allclose(picture.permute(1, 2, 0).numpy(), slow, atol=2e-3)


@pytest.mark.parametrize("pixels", [58, 61, 90, 120])
def test_is_close_to_pillow_where_pixels_align(pixels: int) -> None:
    """Pillow's own filters are another implementation: the images differ by the filter only."""
    name, left, top = "owl", 3, 5
    size = pixels / 128
    place = Placement(SHEET.index(name), left / 128 + size / 2, top / 128 + size / 2, size)
    ours = (render([Scene("single", (place,), 3, (place.sprite,))], SHEET)[0] + 1) * 127.5  # (3, 128, 128)
    sprite = Image.fromarray(SHEET.pixels[place.sprite].permute(1, 2, 0).numpy())
    canvas = Image.new("RGBA", (128, 128), (*BACKGROUNDS["blue"], 255))
    small = sprite.resize((pixels, pixels), Image.Resampling.BILINEAR)
    canvas.alpha_composite(small, (left, top))
    theirs = np.asarray(canvas.convert("RGB"), dtype=np.float32)
    error = np.abs(ours.permute(1, 2, 0).numpy() - theirs)
    assert np.sqrt(np.square(error).mean()) < 4
    assert error.mean() < 1


def test_pictures_do_not_depend_on_their_batch() -> None:
    together = render(SCENES, SHEET)
    assert together.shape == (12, 3, 128, 128)
    assert together.dtype == torch.float32
    assert together.min() >= -1 - 1e-5
    assert together.max() <= 1 + 1e-5
    for i, scene in enumerate(SCENES):
        torch.testing.assert_close(render([scene], SHEET)[0], together[i], atol=2e-2, rtol=0)
    assert torch.equal(render(SCENES, SHEET), together)


def test_background_is_exact_outside_the_stickers() -> None:
    for scene, picture in zip(SCENES, render(SCENES, SHEET), strict=True):
        if all(max(place.x, place.y) + place.size / 2 < 0.98 for place in scene.placements):
            expected = torch.tensor(BACKGROUNDS[COLOURS[scene.background]]) / 127.5 - 1
            torch.testing.assert_close(picture[:, -1, -1], expected)


def test_a_larger_canvas_shows_the_same_picture() -> None:
    small = render(SCENES, SHEET, 64)
    large = torch.nn.functional.avg_pool2d(render(SCENES, SHEET, 128), 2)
    assert (small - large).square().mean().sqrt() < 0.05
