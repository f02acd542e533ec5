"""Fidelity: the best-fitting rendering is found again, whatever place and size it has."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from apps.stickers import STARTER, SceneMix, SceneSampler, load_sprites, render
from apps.stickers.fidelity import measure_fidelity

SHEET = load_sprites()


def scenes(kind: str, count: int = 6):
    sampler = SceneSampler(SHEET, STARTER, split="all", mix=SceneMix(**{k: float(k == kind) for k in KINDS}))
    return [sampler.scene(5, index) for index in range(count)]


KINDS = ("single", "pair", "count")


@pytest.mark.parametrize("kind", KINDS)
def test_a_rendering_is_found_again(kind: str) -> None:
    drawn = scenes(kind)
    images = torch.cat([render([scene], SHEET, 128) for scene in drawn])
    found = measure_fidelity(images, drawn, SHEET)
    assert min(found.psnr) > 40
    assert min(found.ssim) > 0.98
    for scene, best in zip(drawn, found.scenes, strict=True):
        for true, place in zip(scene.placements, best.placements, strict=True):
            assert place.sprite == true.sprite
            assert (place.x, place.y, place.size) == pytest.approx((true.x, true.y, true.size), abs=0.006)


def test_the_places_in_the_scene_do_not_count() -> None:
    drawn = scenes("single")
    images = render(drawn, SHEET, 128)
    moved = [replace(s, placements=(replace(s.placements[0], x=0.1, size=0.2),)) for s in drawn]
    assert measure_fidelity(images, moved, SHEET) == measure_fidelity(images, drawn, SHEET)


def test_another_sticker_a_blur_and_noise_cost_what_they_are_worth() -> None:
    drawn = scenes("single")
    images = render(drawn, SHEET, 128)
    other = [replace(s, sprites=(drawn[i - 1].sprites[0],)) for i, s in enumerate(drawn)]
    exact, wrong = measure_fidelity(images, drawn, SHEET), measure_fidelity(images, other, SHEET)
    assert max(wrong.psnr) < 22 < min(exact.psnr)
    noise = 0.1 * torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = functional.interpolate(noise, scale_factor=16.0, mode="nearest")  # so coarse that 64 px hold it
    # Noise of standard deviation 0.1 in [-1, 1] is 0.05 in [0, 1]: 26 dB; bright and dark pixels clip some of it.
    found = measure_fidelity((images + noisy).clamp(-1, 1), drawn, SHEET)
    assert sum(found.psnr) / 6 == pytest.approx(27, abs=1.5)
