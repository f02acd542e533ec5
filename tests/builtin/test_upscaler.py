"""The built-in upscaler: the weights that were published, and what they give."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines import builtin_models, builtin_upscalers, load_upscaler
from pipelines.info.fingerprint import fingerprint
from pipelines.loading.load import PRETRAINED

NAME = "realesr-animevideov3"
GOLDEN = json.loads(Path(__file__).with_name("golden_upscaler.json").read_text())


def wheel() -> Image.Image:
    """Discs of several colours, 24 x 20 pixels, with edges that a good upscaler sharpens."""
    y, x = np.mgrid[:20, :24]
    inside = (x - 11) ** 2 + (y - 9) ** 2 < 49
    eye = (x - 8) ** 2 + (y - 7) ** 2 < 5
    pixels = np.where(inside[..., None], (230, 120, 30), (250, 220, 60))
    return Image.fromarray(np.where(eye[..., None], (20, 20, 25), pixels).astype(np.uint8))


@pytest.fixture(scope="module")
def upscaler():
    return load_upscaler(NAME, device="cpu")


def test_it_is_an_upscaler_and_no_generator() -> None:
    assert NAME in builtin_upscalers()
    assert NAME not in builtin_models()


def test_its_weights_are_the_published_ones(upscaler) -> None:
    stored = load_file(PRETRAINED / NAME / "diffusion_pytorch_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == 621_424
    halves = {name for name, tensor in stored.items() if tensor.dtype == torch.float16}
    assert halves == {name for name, tensor in stored.items() if tensor.ndim == 4}
    assert fingerprint(upscaler) == GOLDEN["fingerprint"]
    assert upscaler.network.dtype == torch.float32


def test_it_gives_the_numbers_that_the_original_code_gives(upscaler) -> None:
    """Recorded from the authors' own class on the same weights."""
    image = torch.from_numpy(np.asarray(wheel()).copy()).permute(2, 0, 1)[None] / 255  # (1, 3, 20, 24)
    with torch.no_grad():
        found = upscaler.network(image)
    assert found.shape == (1, 3, 80, 96)
    for channel, row, column, value in GOLDEN["pixels"]:
        assert found[0, channel, row, column].item() == pytest.approx(value, abs=1e-4)
    assert found.mean().item() == pytest.approx(GOLDEN["mean"], abs=1e-5)


def test_it_sharpens_edges_and_keeps_colours(upscaler) -> None:
    large, smooth = upscaler(wheel()), wheel().resize((96, 80), Image.Resampling.BICUBIC)
    small = np.asarray(large.resize((24, 20), Image.Resampling.BOX), dtype=float)
    assert np.abs(small - np.asarray(wheel(), dtype=float)).mean() < 6

    def steepest(image: Image.Image) -> float:
        return np.abs(np.diff(np.asarray(image.convert("L"), dtype=float), axis=1)).max()

    assert steepest(large) > 1.3 * steepest(smooth)
