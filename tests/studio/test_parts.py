"""Changing a part of an image, or letting it grow, with models that generate scale by scale: page, CLI and API."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apps.api.app import create_app
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.commands.serve import _start, check_port
from apps.service import engine as engine_module
from apps.service.defaults import fit_size
from apps.service.engine import Engine
from apps.service.metadata import read_picture, request_from_settings
from apps.service.option_values import Expand
from apps.service.outpaint import blend, expanded_size, mask_of, pad_for_outpainting, soft_mask
from apps.service.requests import REQUEST
from apps.studio import views
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from pipelines.next_scale import NextScaleClassToImagePipeline
from tests.models import tiny_next_scale
from tests.pipes.test_next_scale_text import of_bits, of_entries
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.test_page import PAGE, generate_values, pictures

SIDE = 64


def of_classes():
    return NextScaleClassToImagePipeline(
        tiny_next_scale.transformer(), tiny_next_scale.tokenizer(), id2label={0: "tench", 1: "goldfish"}
    )


def noise(width=SIDE, height=SIDE, seed=1):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def middle(width=SIDE, height=SIDE):
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    return mask


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------- canvas


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    shares=st.tuples(*[st.sampled_from([0, 0.125, 0.5, 1.3])] * 4).filter(any),
)
def test_a_canvas_of_the_grown_size_keeps_every_pixel(size, shares):
    expand = Expand(**dict(zip(Expand.model_fields, shares, strict=True)))
    picture = noise(*size)
    laid = pad_for_outpainting(picture, None, expanded_size(size, expand), expand, keep_shape=True)
    kept = np.asarray(laid.mask) == 0
    assert kept.sum() == size[0] * size[1]
    assert (np.asarray(laid.image)[kept].reshape(size[1], size[0], 3) == np.asarray(picture)).all()
    rows, columns = np.nonzero(kept)
    assert rows.min() == round(expand.top * size[1])
    assert columns.min() == round(expand.left * size[0])


def _nearest(mask: np.ndarray) -> np.ndarray:
    """Measure from every pixel to every pixel of a mask: the slow reference."""
    points = np.argwhere(mask)
    places = np.stack(np.meshgrid(*map(np.arange, mask.shape), indexing="ij"), axis=-1)  # (H, W, 2)
    return np.sqrt(((places[:, :, None] - points) ** 2).sum(-1)).min(-1)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(5, 40), st.integers(5, 40)), st.integers(0, 9), st.integers(0, 9), st.integers(0, 10**6))
def test_a_mask_grows_round_and_its_edge_falls_to_nothing_where_it_should(size, grow, blur, seed):
    marked = np.random.default_rng(seed).random(size[::-1]) < 0.02
    marked[size[1] // 2, size[0] // 3] = True
    distance = _nearest(marked)
    alpha = np.asarray(soft_mask(Image.fromarray(marked.astype(np.uint8) * 255), grow, blur)).astype(int)
    assert (alpha[distance <= grow] == 255).all()
    assert (alpha[distance > grow + blur] == 0).all()
    assert (alpha[distance <= grow + blur] > 0).all()
    assert (alpha[distance > grow + 1] < 255).all()
    order = np.argsort(distance, axis=None)
    assert (np.diff(alpha.ravel()[order]) <= 0).all()  # farther is never more


def test_a_soft_edge_blends_and_all_beyond_it_stays_to_the_last_bit():
    original, result = noise(40, 30), noise(40, 30, seed=2)
    alpha = soft_mask(middle(40, 30), 2, 4)
    blended, share = np.asarray(blend(original, result, alpha)).astype(int), np.asarray(alpha)[..., None] / 255
    assert (blended[share[..., 0] == 0] == np.asarray(original)[share[..., 0] == 0]).all()
    assert (blended[share[..., 0] == 1] == np.asarray(result)[share[..., 0] == 1]).all()
    expected = np.asarray(original) * (1 - share) + np.asarray(result) * share
    assert np.abs(blended - expected).max() <= 1
    assert len(set(np.unique(alpha)) - {0, 255}) >= 4
    assert (np.asarray(mask_of(alpha)) > 0).tolist() == (np.asarray(alpha) > 0).tolist()
    hard = soft_mask(middle(40, 30))
    assert set(np.unique(hard)) == {0, 255}
    assert hard.tobytes() == middle(40, 30).tobytes()


def test_the_edge_of_a_mask_is_checked():
    for wish in ({"mask_grow": -1}, {"mask_grow": 129}, {"mask_blur": 65}, {"mask_blur": 1.5}):
        with pytest.raises(ValueError, match="mask_"):
            REQUEST.validate_python({"task": "inpaint", "prompt": "x", "image": "0" * 64, "mask": "0" * 64, **wish})
    with pytest.raises(ValueError, match="mask_grow and mask_blur are for a mask"):
        REQUEST.validate_python({"task": "next_scale_text", "prompt": "x", "mask_blur": 3})


def test_a_canvas_of_another_shape_squeezes_nothing():
    wide, mask = noise(96, 48), middle(96, 48)
    laid = pad_for_outpainting(wide, mask, (64, 64), None, keep_shape=True)
    free = np.asarray(laid.mask) == 255
    assert np.concatenate([free[:16], free[-16:]]).all()  # 96 x 48 fits as 64 x 32
    assert free[16:48].mean() == pytest.approx(0.25)  # the part that was marked
    stretched = pad_for_outpainting(wide, mask, (64, 64), None, keep_shape=False)
    assert (np.asarray(stretched.mask) == 255).mean() == pytest.approx(0.25)
    assert laid.image.size == stretched.image.size == (64, 64)


@pytest.mark.parametrize(
    ("text", "sides"),
    [("0.25", (0.25, 0.25, 0.25, 0.25)), ("left=0.5, top=1", (0.5, 0, 1, 0)), ("right=2", (0, 2, 0, 0))],
)
def test_growth_is_read_as_people_write_it(text, sides):
    found = Expand.from_text(text)
    assert (found.left, found.right, found.top, found.bottom) == sides


@pytest.mark.parametrize("text", ["", "0", "left", "up=1", "3", "left=nan", "left=0.1=2"])
def test_growth_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="share from 0 to 2"):
        Expand.from_text(text)


# -------------------------------------------------------------------------------- sizes


def test_models_with_a_list_of_sizes_get_the_nearest():
    one, many = of_entries(), of_bits()
    assert one.sizes == ((SIDE, SIDE),)
    assert many.sizes[0] == (many.default_height, many.default_width)
    assert len(set(many.sizes)) == len(many.sizes) > 10
    for height, width in many.sizes[:4]:
        assert many.resolve_schedule(height, width)
    model = SimpleNamespace(sizes=tuple((w, h) for h, w in many.sizes))
    tall = fit_size((100, 200), model)
    assert tall[1] > 1.5 * tall[0]
    assert fit_size(model.sizes[3], model) == model.sizes[3]


# ------------------------------------------------------------------------------- engine


@pytest.mark.parametrize(
    "wish",
    [{"image": "0" * 64}, {"mask": "0" * 64}, {"expand": {"left": 1}}, {"image": "0" * 64, "expand": {"left": 9}}],
)
def test_a_picture_and_its_part_belong_together(wish):
    for task in ({"task": "next_scale_text", "prompt": "x"}, {"task": "next_scale_class", "label": 1}):
        with pytest.raises(ValueError, match=r"image goes with mask|less than or equal to 2"):
            REQUEST.validate_python({**task, **wish})
    with pytest.raises(ValueError, match=r"image goes with mask|less than or equal|Field required"):
        REQUEST.validate_python({"task": "inpaint", "prompt": "x", **wish})


CASES = {
    "text": (of_entries, {"prompt": "a red apple"}),
    "bits": (of_bits, {"prompt": "a red apple"}),
    "class": (of_classes, {"inpaint_label": "1: goldfish", "top_k": 0}),
    "denoising": (tiny_text_to_image_pipeline, {"prompt": "a red apple"}),
}


@pytest.fixture(scope="module", params=CASES)
def world(request, tmp_path_factory):
    """A studio, a server and a command line, each with a pipeline of its own of the same weights."""
    make, wish = CASES[request.param]
    out = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: make())
        engine = Engine({"stickers-var": "stickers-var"}, out, device="cpu")
        model = engine.model().result(60)
        sessions = Sessions(None)
        generation = GenerationHandlers(engine, Strings("en"), sessions)
        port = check_port("127.0.0.1", 0)
        server = _start(create_app(engine), "127.0.0.1", port)
        page = {**PAGE, "mode": "inpaint", "model": "stickers-var", "shape": "auto", "seed": 5, **wish}
        yield SimpleNamespace(
            engine=engine, model=model, generation=generation, page=page, address=f"http://127.0.0.1:{port}",
            handlers=SettingsHandlers(engine, Strings("en"), sessions, generation),
        )  # fmt: skip
        server.should_exit = True
        engine.close()


@pytest.mark.parametrize("kind", ["mask", "soft", "expand", "both"])
def test_what_is_kept_is_kept_and_the_file_paints_it_again(world, tmp_path, kind):
    """The bar: kept pixels bit-identical; the same image from its file in the studio, the CLI and the API."""
    width, height = world.model.width, world.model.side
    # Of a model with one size the image must be smaller, else it would be scaled down.
    picture = noise(width, height) if kind in ("mask", "soft") else noise(width // 2, height // 2)
    page = {**world.page, "source": world.engine.uploads.add(picture)}
    if kind != "expand":
        page["mask"] = views.preview_uri(middle(*picture.size))
    if kind == "soft":
        page |= {"mask_grow": 3, "mask_blur": 5}
    if kind in ("expand", "both"):
        page |= {"grow_left": 75, "grow_right": 25, "grow_bottom": 100}
    first = pictures(list(generate_values(world.generation, page)))[0]
    found = pixels(first.path)
    assert found.shape == (height, width, 3)
    kept = np.asarray(picture)
    if kind in ("mask", "soft"):
        edge = (3, 5) if kind == "soft" else (0, 0)
        at, marked = found, np.asarray(soft_mask(middle(width, height), *edge)) > 0
    else:
        left = round(0.75 * picture.width)
        at = found[: picture.height, left : left + picture.width]
        marked = np.asarray(middle(*picture.size)) > 0 if kind == "both" else np.zeros(kept.shape[:2], bool)
    assert (at[~marked] == kept[~marked]).all()
    if marked.any():
        assert (at[marked] != kept[marked]).any()

    settings = read_picture(first.path)
    shown = {key: value for key, value in world.handlers.load_settings(str(first.path)).items() if key in PAGE}
    assert shown["mode"] == "inpaint"
    again = pictures(list(generate_values(world.generation, {**PAGE, **shown})))[0]
    assert (pixels(again.path) == found).all()
    assert read_picture(again.path) == settings

    run(make_options(), tmp_path / "cli.png", DeviceOptions(device="cpu"), settings=first.path)
    assert (pixels(tmp_path / "cli.png") == found).all()
    with httpx.Client(base_url=world.address, trust_env=False, timeout=30) as client:
        job = client.post("/v1/jobs", content=request_from_settings(settings).model_dump_json()).json()["id"]
        assert world.engine.stream(job).wait_closed(30)
        row = client.get(f"/v1/jobs/{job}").json()["pictures"][0]
        assert (pixels(io.BytesIO(client.get(row["url"]).content)) == found).all()


def test_the_page_says_what_fits_the_model(world):
    changes = world.handlers.load_model_controls("stickers-var", "inpaint")
    assert changes["need"] == ""
    is_next_scale = world.model.tasks[0].startswith("next_scale")
    assert changes["repaint"]["visible"] is not is_next_scale  # a slider without a meaning isn't shown
    assert changes["inpaint_label"]["visible"] is bool(world.model.labels)
    assert changes["smooth"]["visible"] is bool(world.model.labels)
    for name in ("steps", "scheduler", "step_cache", "cache_amount"):
        assert changes[name]["visible"] is not is_next_scale, name
    assert changes["search"]["visible"] is changes["candidates"]["visible"] is False  # none of these has a scorer
    if is_next_scale:
        assert changes["top_k"]["value"] == world.model.defaults["top_k"]  # the model's own, not the page's
    need = world.handlers.check_support("stickers-var", "image")["need"]
    assert ("can&#x27;t start from an image" in need) is is_next_scale


# --------------------------------------------------------------------------------- CLI


def test_the_command_line_grows_and_edits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: of_entries())
    noise(48, 48).save(tmp_path / "in.png")
    middle(48, 48).save(tmp_path / "mask.png")
    wishes = make_options(prompt="a fox", image=tmp_path / "in.png", expand="right=0.3333,bottom=0.3333", seed=2)
    run(wishes, tmp_path / "grown.png", DeviceOptions(device="cpu"), json_output=True)
    assert json.loads(capsys.readouterr().out)["pictures"][0]["expand"]["right"] == 0.3333
    assert (pixels(tmp_path / "grown.png")[:48, :48] == pixels(tmp_path / "in.png")).all()
    run(make_options(prompt="a fox", image=tmp_path / "in.png", mask=tmp_path / "mask.png"), tmp_path / "b.png",
        DeviceOptions(device="cpu"))  # fmt: skip
    assert read_picture(tmp_path / "b.png").task == "next_scale_text"
    soft = make_options(prompt="a fox", image=tmp_path / "in.png", mask=tmp_path / "mask.png", mask_grow=2, mask_blur=4)
    run(soft, tmp_path / "soft.png", DeviceOptions(device="cpu"))
    assert (read_picture(tmp_path / "soft.png").mask_grow, read_picture(tmp_path / "soft.png").mask_blur) == (2, 4)
    with pytest.raises(ValueError, match="can't do image to image"):
        run(make_options(prompt="a fox", image=tmp_path / "in.png"), tmp_path / "c.png", DeviceOptions(device="cpu"))
    with pytest.raises(ValueError, match="strength"):
        run(make_options(prompt="a fox", image=tmp_path / "in.png", mask=tmp_path / "mask.png", strength=0.5),
            tmp_path / "c.png", DeviceOptions(device="cpu"))  # fmt: skip
