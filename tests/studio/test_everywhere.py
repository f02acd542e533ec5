"""One image, generated in the studio, comes out the same from its file alone: in the studio, the CLI and the API."""

from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
from PIL import Image

from apps.api.app import create_app
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.commands.serve import _start, check_port
from apps.service import engine as engine_module
from apps.service.metadata import read_picture, request_from_settings
from apps.service.outpaint import soft_mask
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.test_page import PAGE, generate_values, pictures

MODES = {
    "text": {"scheduler": "unipc", "guidance": 3.0, "shape": "64x32"},
    "cached": {"mode": "text", "step_cache": "taylorseer", "steps": 8},
    "batch": {"mode": "text", "num_images": 3, "batch_size": 3},
    "webp": {"mode": "text", "file_format": "webp", "style": "watercolour"},
    "quantized": {"mode": "text", "quantization": "w4a8"},
    "image": {"strength": 0.7},
    "inpaint": {"repaint": 0.9, "scheduler": "heun"},
    "soft": {"mode": "inpaint", "mask_grow": 2, "mask_blur": 3},
    "area": {"mode": "inpaint", "mask_grow": 2, "mask_blur": 3, "mask_padding": 4},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A studio, a server and a command line, each with a pipeline of its own of the same weights."""
    out = tmp_path_factory.mktemp("everywhere")
    with pytest.MonkeyPatch.context() as patch:
        load = lambda self, source, device, load_options: tiny_text_to_image_pipeline()  # noqa: E731
        patch.setattr(engine_module.Engine, "_load_pipeline", load)
        engine = engine_module.Engine({"stickers": "stickers"}, out, device="cpu")
        engine.model().result(60)
        sessions = Sessions(None)
        generation = GenerationHandlers(engine, Strings("en"), sessions)
        port = check_port("127.0.0.1", 0)
        server = _start(create_app(engine), "127.0.0.1", port)
        yield (
            engine,
            generation,
            SettingsHandlers(engine, Strings("en"), sessions, generation),
            f"http://127.0.0.1:{port}",
        )
        server.should_exit = True
        engine.close()


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


@pytest.mark.parametrize("name", MODES)
def test_the_file_is_enough(world, tmp_path, name):
    engine, generation, handlers, address = world
    width, height = (90, 70) if name == "area" else (32, 32)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    mask = Image.new("L", picture.size)
    mask.paste(255, (8, 8, 24, 24))
    page = {**PAGE, "mode": name, "model": "stickers", "shape": "auto", "seed": 21, **MODES[name]}
    if page["mode"] in ("image", "inpaint"):
        page |= {"source": engine.uploads.add(picture)}
    if page["mode"] == "inpaint":
        from apps.studio import views

        page |= {"mask": views.preview_uri(mask)}
    first = pictures(list(generate_values(generation, page)))[0]
    settings = read_picture(first.path)

    shown = {key: value for key, value in handlers.load_settings(str(first.path)).items() if key in PAGE}
    again = pictures(list(generate_values(generation, {**PAGE, **shown})))[: shown["num_images"]]  # the newest
    assert [pixels(one.path) for one in again if one.settings.seed == settings.seed] == [pixels(first.path)]

    run(make_options(), tmp_path / "cli.png", DeviceOptions(device="cpu"), settings=first.path)
    assert pixels(tmp_path / "cli.png") == pixels(first.path)
    assert read_picture(tmp_path / "cli.png") == settings

    with httpx.Client(base_url=address, trust_env=False, timeout=30) as client:
        job = client.post("/v1/jobs", content=request_from_settings(settings).model_dump_json()).json()["id"]
        assert engine.stream(job).wait_closed(60)
        row = client.get(f"/v1/jobs/{job}").json()["pictures"][0]
        with Image.open(io.BytesIO(client.get(row["url"]).content)) as image:
            assert image.convert("RGB").tobytes() == pixels(first.path)
    if page["mode"] == "inpaint":
        kept = np.asarray(soft_mask(mask, settings.mask_grow or 0, settings.mask_blur or 0)) == 0
        assert bool((~kept).sum() > 256) is (name in ("soft", "area"))
        with Image.open(first.path) as image:
            assert (np.asarray(image.convert("RGB"))[kept] == np.asarray(picture)[kept]).all()
