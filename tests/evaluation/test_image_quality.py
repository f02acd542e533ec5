"""How well images are drawn: exact renderings, spoiled ones, and the sheet of the worst."""

import pytest
import torch
from torch.nn import functional

from apps.commands.image_quality import ImageQuality, PretrainedNetworks
from apps.stickers import STARTER, SceneMix, SceneSampler, load_sprites, render

SHEET = load_sprites()
SCENES = [SceneSampler(SHEET, STARTER, mix=SceneMix(1, 0, 0)).scene(3, index) for index in range(8)]
NETWORKS = PretrainedNetworks(SHEET)


def blurred(images: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(functional.avg_pool2d(images, 8), scale_factor=8, mode="bilinear")


def test_spoiled_images_are_worse_by_every_measure() -> None:
    images = render(SCENES, SHEET, 128)
    exact, spoiled = ImageQuality(SHEET, NETWORKS), ImageQuality(SHEET, NETWORKS)
    for part in (slice(0, 5), slice(5, 8)):
        exact.add(images[part], SCENES[part])
        spoiled.add(blurred(images[part]), SCENES[part])
    assert exact.fidelity()["psnr"] > 40 > spoiled.fidelity()["psnr"] + 12
    assert exact.fidelity()["ssim"] > 0.98 > spoiled.fidelity()["ssim"]
    assert exact.fidelity()["psnr_worst_tenth"] == pytest.approx(min(exact.psnr))
    near, far = exact.perceptual(), spoiled.perceptual()
    assert near["st_lpips"] < 0.1 * far["st_lpips"]
    assert near["frechet_lite0"] < 0.1 * far["frechet_lite0"]
    assert near["nearest_recall"] == 1.0


def test_without_networks_only_fidelity_is_measured() -> None:
    quality = ImageQuality(SHEET)
    quality.add(render(SCENES[:2], SHEET, 128), SCENES[:2])
    assert quality.fidelity()["psnr"] > 40
    assert quality.perceptual() == {}
    assert quality.worst == []


def test_the_sheet_of_the_worst_begins_with_the_worst(monkeypatch) -> None:
    monkeypatch.setattr("apps.commands.image_quality.WORST_SHOWN", 3)
    images = render(SCENES, SHEET, 128)
    images[4] = blurred(images[4:5])[0]
    quality = ImageQuality(SHEET)
    quality.add(images, SCENES, [f"prompt {index}" for index in range(8)])
    ranked = sorted(quality.worst, key=lambda entry: -entry[0])
    assert ranked[0][2] == "prompt 4"
    assert len(ranked) == 3
    assert [-entry[0] for entry in ranked] == sorted(quality.psnr)[:3]
    assert quality.worst_sheet("test").size[0] > 1000
