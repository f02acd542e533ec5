"""Inpainting and ending early: what is kept stays bit for bit, and the algorithm is the one that is described."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.inputs.inpaint import InpaintRegion, fill_in, keep_pixels, read_mask, touched_cells
from tests.pipes.tiny import tiny_text_to_image_pipeline


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_text_to_image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photo(side=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def box(side=32, left=8, top=16, right=24, bottom=32):
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def paint(pipe, **settings):
    defaults = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "strength": 1.0}
    return pipe("a cat", image=photo(), mask_image=box(), **{**defaults, **settings})


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_kept_pixels_are_the_same_bits_and_the_others_change(pipe, strength):
    painted = np.asarray(paint(pipe, strength=strength).images[0])
    original, inside = np.asarray(photo()), np.asarray(box()) > 0
    assert (painted[~inside] == original[~inside]).all()
    assert (painted[inside] != original[inside]).any()


def test_the_run_sees_the_original_at_each_noise_level(pipe):
    """A slow reference: the kept cells after step i are (1 - sigma) data + sigma noise, sigma of step i + 1."""
    seen = []

    def watch(_, step, timestep, tensors):
        seen.append(tensors["latents"].clone())

    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    paint(pipe, latents=noise, callback_on_step_end=watch, num_inference_steps=4)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[1:]]
    filled = fill_in(torch.from_numpy(np.array(photo())).permute(2, 0, 1)[None] / 127.5 - 1, read_mask(box(), 32, 32))
    data = pipe.encode_image(((filled + 1) / 2).clamp(0, 1), 32, 32)
    kept = ~touched_cells(read_mask(box(), 32, 32), 4, 4).expand(1, 4, 4, 4)
    for latents, sigma in zip(seen, sigmas, strict=True):
        expected = (1 - sigma) * data + sigma * noise
        torch.testing.assert_close(latents[kept], expected[kept], rtol=1e-4, atol=1e-4)


def test_what_lies_under_the_mask_leaves_no_trace(pipe):
    other = photo()
    other.paste((255, 0, 0), (8, 16, 24, 32))  # exactly the masked box
    one, two = (
        pipe("x", image=image, mask_image=box(), strength=1.0, num_inference_steps=2,
             generator=torch.Generator().manual_seed(0)).images[0] for image in (photo(), other)
    )  # fmt: skip
    assert one.tobytes() == two.tobytes()


def test_holes_are_filled_from_around():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 1.0
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 4:12, 2:14] = True
    filled = fill_in(torch.where(mask, 77.0, pixels), mask)
    assert torch.equal(filled[~mask.expand_as(filled)], pixels[~mask.expand_as(filled)])
    assert filled.min() >= 0
    assert filled.max() <= 1
    assert filled[0, 0, 8, 3] < filled[0, 0, 8, 12]
    assert torch.equal(fill_in(pixels, torch.ones(1, 1, 16, 16, dtype=torch.bool)), torch.zeros_like(pixels))


def test_region_is_exact_at_both_ends():
    data, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    mask = read_mask(box(), 32, 32)
    region = InpaintRegion(torch.zeros(2, 3, 32, 32), mask.expand(2, -1, -1, -1), data, noise)
    free = torch.randn(2, 4, 4, 4)
    cells = region.cells.expand_as(free)
    assert torch.equal(region.blend(free, 0.0)[~cells], data[~cells])
    assert torch.equal(region.blend(free, 1.0)[~cells], noise[~cells])
    assert torch.equal(region.blend(free, 0.3)[cells], free[cells])


def test_masks_are_checked():
    with pytest.raises(ValueError, match="black everywhere"):
        read_mask(Image.new("L", (8, 8)), 8, 8)
    with pytest.raises(ValueError, match="divide 8-bit"):
        read_mask(np.full((8, 8), 255.0), 8, 8)
    with pytest.raises(ValueError, match="shape"):
        read_mask(torch.ones(3, 8, 8), 8, 8)
    with pytest.raises(TypeError, match="str"):
        read_mask("mask.png", 8, 8)
    assert read_mask(np.eye(4)[..., None], 8, 8).sum() == 16


def test_a_mask_needs_a_picture(pipe):
    with pytest.raises(ValueError, match="without image"):
        pipe("x", mask_image=box(), num_inference_steps=1)


def test_pixels_of_any_pipeline_can_be_kept():
    painted = Image.new("RGB", (32, 32), "red")
    both = np.asarray(keep_pixels(photo(), painted, box()))
    inside = np.asarray(box()) > 0
    assert (both[inside] == (255, 0, 0)).all()
    assert (both[~inside] == np.asarray(photo())[~inside]).all()
    with pytest.raises(ValueError, match="sizes differ"):
        keep_pixels(photo(), painted, box(16))


def test_finish_now_decodes_the_estimate_after_the_present_step(pipe):
    seen = []

    def watch(running, step, timestep, tensors):
        seen.append(tensors["denoised_latents"])
        running.finish_now = step == 1

    settings = {"num_inference_steps": 6, "callback_on_step_end_tensor_inputs": ["denoised_latents"]}
    early = pipe("x", callback_on_step_end=watch, generator=torch.Generator().manual_seed(0), output_type="latent",
                 **settings)  # fmt: skip
    assert len(seen) == 2
    assert torch.equal(early.images, seen[1])
    assert not pipe.interrupted
    whole = pipe("x", generator=torch.Generator().manual_seed(0), output_type="latent", num_inference_steps=6)
    assert not torch.equal(whole.images, early.images)  # and the wish is forgotten by the next call
