"""Only the masked area of an image is generated: where it lies, what of the image stays, and at which size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apps.service.engine import Engine
from apps.service.events import Done
from apps.service.masked_area import area_box, cut_out, mask_edge
from apps.service.request_error import RequestError
from apps.service.requests import REQUEST, InpaintRequest
from tests.pipes.tiny import tiny_text_to_image_pipeline

SIDES = st.integers(1, 60)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def masked(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.data(), st.integers(1, 20), st.tuples(SIDES, SIDES))
def test_the_area_holds_the_mask_and_has_the_shape_as_far_as_the_image_goes(width, height, data, padding, shape):
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    alpha = masked((width, height), (left, top, right, bottom))
    plain, box = area_box(alpha, padding, None), area_box(alpha, padding, shape)
    assert plain == (max(left - padding, 0), max(top - padding, 0), min(right + padding, width), min(bottom + padding, height))  # fmt: skip # noqa: E501
    assert 0 <= box[0] <= plain[0] < plain[2] <= box[2] <= width
    assert 0 <= box[1] <= plain[1] < plain[3] <= box[3] <= height
    across, down = box[2] - box[0], box[3] - box[1]
    is_shaped = abs(across * shape[1] - down * shape[0]) <= max(shape)  # to a pixel
    assert is_shaped or across == width or down == height


@settings(max_examples=40, deadline=None)
@given(st.tuples(SIDES, SIDES), st.data(), st.integers(0, 3), st.integers(0, 4), st.sampled_from((1, 2, 3)))
def test_beyond_the_mask_every_pixel_stays(size, data, grow, blur, scale):
    left, top = data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1))
    right, bottom = data.draw(st.integers(left + 1, size[0])), data.draw(st.integers(top + 1, size[1]))
    image, mask = noise(*size), masked(size, (left, top, right, bottom))
    alpha = mask_edge(mask, size, grow, blur)
    area = cut_out(image, alpha, (32, 48), 3)
    assert area.image.size == area.mask.size == (32, 48)
    whole = np.asarray(area.put_back(Image.new("RGB", (32 * scale, 48 * scale), (255, 0, 255))))
    before, shows = np.asarray(image), np.asarray(alpha)
    assert (whole[shows == 0] == before[shows == 0]).all()
    assert (whole[shows == 255] == (255, 0, 255)).all()


def test_an_area_of_the_canvas_s_size_is_put_back_pixel_by_pixel():
    image, mask = noise(100, 80), masked((100, 80), (40, 30, 50, 40))
    area = cut_out(image, mask_edge(mask, image.size, 0, 0), (32, 32), 11)
    assert area.box == (29, 19, 61, 51)
    assert area.image.tobytes() == image.crop(area.box).tobytes()
    whole = area.put_back(noise(32, 32, seed=1))
    assert np.asarray(whole)[30:40, 40:50].tobytes() == np.asarray(noise(32, 32, seed=1))[11:21, 11:21].tobytes()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    one = Engine(
        {"tiny": "x"}, tmp_path_factory.mktemp("out"), device="cpu", load=lambda _: tiny_text_to_image_pipeline()
    )
    one.model().result(60)
    yield one
    one.close()


@pytest.mark.parametrize(("upscale", "size"), [(None, (None, None)), (2, (64, 32))])
def test_the_image_keeps_its_size_and_the_area_has_the_model_s(engine, upscale, size):
    image, box = noise(150, 120), (20, 30, 50, 90)
    names = {"image": engine.uploads.add(image), "mask": engine.uploads.add(masked(image.size, box))}
    request = InpaintRequest(
        prompt="a fox", seed=3, steps=2, mask_padding=4, upscale=upscale, width=size[0], height=size[1], **names
    )
    *_, found, done = engine.generate(request)
    assert isinstance(done, Done), done
    assert found.image.size == found.metadata.shown_size == (150, 120)
    generated = found.metadata.width, found.metadata.height
    assert generated == (size if upscale else generated)
    assert generated[0] * generated[1] <= 2 * 32 * 32  # as many pixels as the model was made for, not the image's
    assert upscale or generated[1] > generated[0]  # in the shape of the area
    outside = np.asarray(masked(image.size, box)) == 0
    assert (np.asarray(found.image)[outside] == np.asarray(image)[outside]).all()
    assert (np.asarray(found.image)[~outside] != np.asarray(image)[~outside]).mean() > 0.5


def test_an_area_needs_a_mask_and_no_growing_sides():
    for given_ in ({}, {"mask": "1" * 64, "expand": {"left": 0.5}}, {"expand": {"left": 0.5}}):
        asked = {"task": "inpaint", "prompt": "x", "image": "0" * 64, "mask_padding": 8, **given_}
        with pytest.raises((RequestError, ValueError), match="mask"):
            REQUEST.validate_python(asked)
    for padding in (0, -1, 513, 1.5):
        asked = {"task": "inpaint", "prompt": "x", "image": "0" * 64, "mask": "1" * 64, "mask_padding": padding}
        with pytest.raises(ValueError, match="mask_padding"):
            REQUEST.validate_python(asked)
