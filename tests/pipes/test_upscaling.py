"""Enlarging images: any kind in, the same kind out; in tiles without seams; by networks and by diffusers' pipelines."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import Upscaler, load_upscaler
from pipelines.loading.load import PRETRAINED
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.pipes.tiny_upscalers import tiny_latent_upscale_pipeline, tiny_network, tiny_upscale_pipeline


@pytest.fixture(scope="module")
def upscaler() -> Upscaler:
    return Upscaler(tiny_network())


def noise(width: int = 13, height: int = 9, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("tile", [5, 16])
def test_tiles_leave_no_seams(upscaler: Upscaler, scale: int, tile: int) -> None:
    images = torch.rand(2, 3, 23, 34)
    whole, tiled = upscaler(images, scale), upscaler(images, scale, tile=tile)
    assert whole.shape == (2, 3, scale * 23, scale * 34)
    assert (whole - tiled).abs().max() < 2e-5
    assert whole.std() > 0.05


def test_a_smaller_scale_is_the_networks_output_reduced(upscaler: Upscaler) -> None:
    images = torch.rand(1, 3, 12, 16)
    reduced = torch.nn.functional.interpolate(upscaler(images), size=(24, 32), mode="bicubic", antialias=True)
    assert torch.allclose(upscaler(images, 2), reduced.clamp(0, 1), atol=1e-5)
    assert torch.equal(upscaler(images, 1), images)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pil_images_keep_their_mode(upscaler: Upscaler, mode: str) -> None:
    image = noise(mode=mode)
    large = upscaler(image, 2)
    assert (large.size, large.mode) == ((26, 18), mode)
    if "A" in mode:
        alpha = image.getchannel("A").resize((26, 18), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(large.getchannel("A")), np.asarray(alpha))
    colours = upscaler(image.convert("RGB"), 2).convert("L" if mode.startswith("L") else "RGB")
    assert np.array_equal(np.asarray(large.convert(colours.mode)), np.asarray(colours))


def test_palettes_become_colours(upscaler: Upscaler) -> None:
    image = noise().convert("P")
    assert np.array_equal(np.asarray(upscaler(image, 2)), np.asarray(upscaler(image.convert("RGB"), 2)))
    image.info["transparency"] = 0
    assert upscaler(image, 2).mode == "RGBA"


def test_every_form_gives_the_same_pixels(upscaler: Upscaler) -> None:
    """What pipelines return as PIL images, arrays and tensors, single, in batches and as clips."""
    frames = [noise(seed=seed) for seed in range(3)]
    pictures = upscaler(frames, 4)
    stack = np.stack([np.asarray(frame) for frame in frames])  # (3, 9, 13, 3)
    bytes_ = upscaler(stack, 4)
    assert isinstance(pictures, list)
    assert np.array_equal(bytes_, np.stack([np.asarray(one) for one in pictures]))
    assert np.array_equal(upscaler(frames[1], 4), bytes_[1])
    floats = upscaler(stack[None].astype(np.float32) / 255, 4)  # (1, 3, 9, 13, 3), as clips come
    assert floats.dtype == np.float32
    assert np.abs(floats[0] - bytes_ / 255).max() < 0.51 / 255
    tensor = upscaler(torch.from_numpy(stack).permute(0, 3, 1, 2), 4)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), bytes_)
    clips = upscaler([frames[:2], frames[2:]], 4)
    assert [len(clip) for clip in clips] == [2, 1]
    assert np.array_equal(np.stack([np.asarray(frame) for clip in clips for frame in clip]), bytes_)


def test_images_of_several_sizes_go_in_one_call(upscaler: Upscaler) -> None:
    images = [noise(13, 9), noise(8, 20), noise(8, 20, seed=1)]
    assert [one.size for one in upscaler(images)] == [(52, 36), (32, 80), (32, 80)]


def test_progress_is_told_and_work_can_be_ended(upscaler: Upscaler) -> None:
    told: list[tuple[int, int]] = []
    upscaler([noise(), noise()], tile=8, on_chunk=lambda done, count: told.append((done, count)))
    assert told == [(done, 8) for done in range(9)]  # 2 x 2 tiles of 2 images

    def end(done: int, count: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upscaler([noise(), noise()], tile=8, on_chunk=end)


def test_several_images_at_once_give_what_each_gives_alone(upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerators work: images of one size go through the network together."""
    images = [noise(seed=seed) for seed in range(3)] + [noise(8, 20)]
    alone, told = upscaler(images, 2), []
    monkeypatch.setattr("pipelines.upscaling._Work._together", lambda self, height, width: 2)
    together = upscaler(images, 2, tile=8, on_chunk=lambda done, count: told.append((done, count)))
    differences = [np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(alone, together, strict=True)]
    assert max(differences) <= 1  # a last bit may round the other way
    assert [done for done, _ in told] == [0, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15]
    assert told[-1] == (15, 15)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scale": 5}, r"scale is 5.*choose 1 to 4"),
        ({"scale": 0}, r"scale is 0.*from 1"),
        ({"scale": 2.5}, r"scale is 2\.5"),
        ({"tile": 0}, "tile is 0"),
        ({"images": []}, "empty list"),
        ({"images": torch.rand(1, 4, 8, 8)}, r"\(1, 4, 8, 8\)"),
        ({"images": torch.rand(1, 3, 8, 8) * 2 - 1}, r"floats in \[0, 1\]"),
        ({"images": torch.full((1, 3, 8, 8), torch.nan)}, r"floats in \[0, 1\]"),
        ({"images": torch.zeros(3, 8, 8, dtype=torch.int64)}, "int64"),
        ({"images": np.zeros((8, 8))}, r"\(\.\.\., H, W, 3\)"),
        ({"images": Image.new("CMYK", (8, 8))}, "CMYK"),
    ],
)
def test_what_is_not_accepted_is_named(upscaler: Upscaler, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        upscaler(**{"images": noise(), **arguments})


def test_a_network_takes_no_options_of_pipelines(upscaler: Upscaler) -> None:
    with pytest.raises(TypeError, match="num_inference_steps"):
        upscaler(noise(), num_inference_steps=2)
    with pytest.raises(TypeError, match="images is a str"):
        upscaler("a.png")


# ----------------------------------------------------------------------- diffusers' pipelines


@pytest.mark.parametrize(
    ("make", "factor"), [(tiny_upscale_pipeline, 4), (tiny_latent_upscale_pipeline, 2)], ids=["x4", "latent x2"]
)
def test_a_pipeline_of_diffusers_is_an_upscaler(make: Any, factor: int) -> None:
    """Sizes that it doesn't take are filled up and cut off again; the same seed gives the same image."""
    upscaler = Upscaler(make())
    assert upscaler.factor == factor
    image, seed = noise(40, 24), torch.Generator().manual_seed(3)
    asked = {"prompt": "a cat", "generator": seed, "num_inference_steps": 2}
    large = upscaler(image, **asked)
    assert large.size == (factor * 40, factor * 24)
    assert np.array_equal(large, upscaler([image, image], **asked)[1])  # every frame of a clip has the same noise
    assert upscaler(image, 2, **asked).size == (80, 48)
    tensor = upscaler(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), **asked)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), large)
    with pytest.raises(ValueError, match=f"choose 1 to {factor}"):
        upscaler(image, factor + 1, **asked)


def test_a_pipeline_can_be_ended_between_two_steps() -> None:
    told: list[int] = []

    def end(done: int, count: int) -> None:
        told.append(done)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Upscaler(tiny_upscale_pipeline())(noise(32, 32), num_inference_steps=8, on_chunk=end)
    assert told == [0, 0, 0]


def test_pipelines_that_generate_are_no_upscalers() -> None:
    with pytest.raises(TypeError, match=r"strength.*StableDiffusionUpscalePipeline"):
        Upscaler(tiny_text_to_image_pipeline())
    with pytest.raises(TypeError, match="no 'image'"):
        Upscaler(torch.nn.Identity())


# ------------------------------------------------------------------------------------ loading


def test_networks_and_pipelines_load_from_folders(tmp_path) -> None:
    tiny_network(2).save_pretrained(tmp_path / "network")
    network = load_upscaler(tmp_path / "network", device="cpu")
    assert (network.factor, network.name) == (2, "network")
    assert np.array_equal(network(noise()), Upscaler(tiny_network(2))(noise()))
    tiny_latent_upscale_pipeline().save_pretrained(tmp_path / "pipeline")
    assert load_upscaler(tmp_path / "pipeline", device="cpu").factor == 2


def test_what_is_no_upscaler_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="realesr-animevideov3"):
        load_upscaler("realesr")
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        load_upscaler("/nowhere/at/all")
    with pytest.raises(ValueError, match="expected a CompactUpscaler"):
        load_upscaler(PRETRAINED / "stickers" / "transformer")
    with pytest.raises(TypeError, match="strength"):
        load_upscaler(PRETRAINED / "stickers", device="cpu")
    tiny_network().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "CompactUpscaler", "factor": 4000000}')
    with pytest.raises(ValueError, match="factor"):
        load_upscaler(tmp_path)
    with pytest.raises(TypeError, match="offload"):
        load_upscaler("realesr-animevideov3", offload="none")
