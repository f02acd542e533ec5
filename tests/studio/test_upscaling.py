"""Upscaling through engine, command line, API and page: what is enlarged, what is recorded, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import av
import httpx
import numpy as np
import pytest
from diffusers import StableDiffusionLatentUpscalePipeline
from PIL import Image

from apps.commands.batch import run_batch
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.service import engine as engine_module
from apps.service import limits
from apps.service.defaults import fit_size
from apps.service.engine import Engine
from apps.service.events import Done, Failed, Picture, Step, Stopped, Upscaling
from apps.service.grid import AXES
from apps.service.metadata import read_picture, request_from_settings, save_sidecar
from apps.service.requests import InpaintRequest, TextToImageRequest
from apps.service.upscaling import UnknownUpscalerError
from apps.service.usage import UsageError
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.live import progress_line
from apps.studio.panels import usual_upscale
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from pipelines import Upscaler
from tests.families.tiny import tiny_pipeline
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.pipes.tiny_upscalers import tiny_latent_upscale_pipeline, tiny_network
from tests.studio.browsers import open_browser
from tests.studio.fakes import FakePipeline
from tests.studio.test_api import ASK, serving
from tests.studio.test_page import PAGE, generate_values, pictures
from tests.studio.test_server import PROJECT, note_says, open_page, wait_for_address

CPU = DeviceOptions(device="cpu")
WORDS = Strings("en")
SIZE = {"width": 64, "height": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a network that enlarges by 4."""
    place = tmp_path_factory.mktemp("upscalers") / "net4"
    tiny_network().save_pretrained(place)
    return place


@pytest.fixture
def world(tmp_path, folder):
    """An engine of a fake pipeline with a small upscaler."""
    out, pipe = tmp_path / "out", FakePipeline()
    out.mkdir()
    engine = Engine({"fake": "x"}, out, device="cpu", load=lambda source: pipe, upscalers={"net4": str(folder)})
    yield SimpleNamespace(engine=engine, pipe=pipe, out=out)
    engine.close()


@pytest.fixture
def on_the_command_line(monkeypatch):
    """A fake pipeline in the place of what the command line loads."""
    pipe = FakePipeline()
    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: pipe)
    return pipe


def ask(**more):
    return TextToImageRequest(**{"prompt": "a fox", "steps": 2, "seed": 3, **SIZE, **more})


def events(world, request):
    found = list(world.engine.generate(request))
    assert isinstance(found[-1], Done), found[-1]
    return found


def only(world, request):
    return next(event for event in events(world, request) if isinstance(event, Picture))


def pixels(image):
    return np.asarray(image.convert("RGB"))


# --------------------------------------------------------------------------------- the engine


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_finished_image_is_enlarged_and_the_record_is_of_the_image_before(world, scale):
    plain, large = only(world, ask()), only(world, ask(upscale=scale))
    assert large.image.size == (64 * scale, 48 * scale)
    assert np.array_equal(pixels(large.image), pixels(Upscaler(tiny_network())(plain.image, scale)))
    settings = read_picture(large.path)
    assert (settings.width, settings.height, settings.upscale, settings.upscaler) == (64, 48, scale, "net4")
    assert settings.shown_size == Image.open(large.path).size == large.image.size
    assert len(settings.upscaler_fingerprint) == 16
    assert plain.metadata.upscale is plain.metadata.upscaler is plain.metadata.upscaler_fingerprint is None


def test_settings_repeat_it_to_the_last_bit(world):
    first = only(world, ask(upscale=4))
    assert only(world, request_from_settings(first.metadata)).path.read_bytes() == first.path.read_bytes()
    before = request_from_settings(first.metadata, upscale=1)  # the image as it was
    assert before.upscaler is None
    assert only(world, before).image.size == (64, 48)


def test_one_leaves_the_image_as_it_is(world):
    assert np.array_equal(pixels(only(world, ask(upscale=1)).image), pixels(only(world, ask()).image))
    assert only(world, ask(upscale=1)).metadata.upscale is None


def test_enlarging_is_told_between_the_last_step_and_the_image(world):
    kinds = [type(event) for event in events(world, ask(upscale=2))]
    assert kinds[-5:] == [Step, Upscaling, Upscaling, Picture, Done]
    told = [event for event in events(world, ask(upscale=2, num_images=2)) if isinstance(event, Upscaling)]
    assert [(one.done, one.count, one.picture, one.pictures) for one in told] == [
        (0, 1, 1, 2), (1, 1, 1, 2), (0, 1, 2, 2), (1, 1, 2, 2),
    ]  # fmt: skip
    assert [one.share for one in told] == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("how", ["stop", "skip"])
def test_a_job_ends_between_two_pieces(world, how, monkeypatch):
    reached, seen = threading.Event(), []

    def slow(self, images, scale, on_chunk, **options):
        for done in range(100):
            on_chunk(done, 100)
            seen.append(done)
            reached.set()
            threading.Event().wait(0.02)
        return images

    monkeypatch.setattr(Upscaler, "__call__", slow)
    job = world.engine.submit(ask(upscale=2))
    assert reached.wait(30)
    getattr(world.engine, how)(job)
    stream = world.engine.stream(job)
    assert stream.wait_closed(30)
    assert isinstance(list(stream)[-1], {"stop": Stopped, "skip": Done}[how])
    assert len(seen) < 50
    assert world.engine.pictures(job) == []


def test_names_are_those_of_the_servers_list(world, folder):
    """A request can name no folder and no repository, as with models."""
    assert world.engine.upscalers.names == ("net4",)
    for name in (str(folder), "user/repository", "realesr-animevideov3", "../net4", ""):
        with pytest.raises(UnknownUpscalerError, match="choose among net4"):
            world.engine.submit(ask(upscale=2, upscaler=name))
    assert only(world, ask(upscale=2, upscaler="net4")).metadata.upscaler == "net4"


def test_without_a_list_the_built_in_one_is_offered():
    assert Engine({"fake": "x"}, device="cpu", load=lambda source: FakePipeline()).upscalers.names == (
        "realesr-animevideov3",
    )


def test_an_upscaler_that_does_not_load_ends_the_job_before_it_generates(tmp_path):
    pipe = FakePipeline()
    engine = Engine({"fake": "x"}, device="cpu", load=lambda source: pipe, upscalers={"gone": str(tmp_path / "gone")})
    last = list(engine.generate(ask(upscale=2)))[-1]
    engine.close()
    assert isinstance(last, Failed)
    assert (last.code, "gone" in last.message, str(tmp_path) in last.message) == ("model_failed", True, False)
    assert pipe.steps_run == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"upscale": 0}, "greater than or equal to 1"),
        ({"upscale": 5}, "less than or equal to 4"),
        ({"upscaler": "net4"}, "give upscale too"),
        ({"upscaler": "net4", "upscale": 1}, "give upscale too"),
        ({"upscale": 4, "width": 2048, "height": 1024}, r"33554432 pixels.*choose 1 to 2"),
        ({"upscale": 4, "width": 512, "height": 512, "frames": 257}, r"257 frames.*choose 1 to 1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(fields, says):
    with pytest.raises(ValueError, match=says):
        ask(**fields)


def test_the_models_own_size_is_checked_too(world, monkeypatch):
    monkeypatch.setattr(limits, "MAX_UPSCALED_PIXELS", 128 * 128 * 4)
    last = list(world.engine.generate(ask(width=None, height=None, upscale=4)))[-1]
    assert (last.code, "choose 1 to 2" in last.message) == ("bad_request", True)
    assert world.pipe.steps_run == 0


def test_a_pipeline_of_diffusers_takes_the_same_place(tmp_path, monkeypatch):
    """Its noise is drawn from the image's seed, so that settings repeat it; it is told by how much it enlarges."""
    tiny_latent_upscale_pipeline().save_pretrained(tmp_path / "latent")
    whole = StableDiffusionLatentUpscalePipeline.__call__

    def in_two_steps(self, prompt=None, image=None, generator=None, output_type="pil", callback=None):
        return whole(self, prompt, image, 2, generator=generator, output_type=output_type, callback=callback)

    monkeypatch.setattr(StableDiffusionLatentUpscalePipeline, "__call__", in_two_steps)
    pipe, sources = FakePipeline(), {"latent": str(tmp_path / "latent")}
    engine = Engine({"fake": "x"}, device="cpu", load=lambda source: pipe, upscalers=sources)
    jobs = [engine.generate(ask(upscale=2, seed=seed)) for seed in (3, 3, 4)]
    shown = [next(event for event in job if isinstance(event, Picture)) for job in jobs]
    refused = list(engine.generate(ask(upscale=4)))[-1]
    engine.close()
    assert shown[0].image.size == (128, 96)
    assert np.array_equal(pixels(shown[0].image), pixels(shown[1].image))
    assert not np.array_equal(pixels(shown[0].image), pixels(shown[2].image))
    assert (refused.code, "choose 1 to 2" in refused.message) == ("bad_request", True)


# ------------------------------------------------------------------------------------ clips


def test_the_frames_of_a_clip_are_enlarged_before_they_are_encoded(tmp_path, folder):
    pipe = tiny_pipeline("wan")
    engine = Engine({"wan": "x"}, tmp_path, device="cpu", load=lambda source: pipe, upscalers={"net4": str(folder)})
    request = TextToImageRequest(prompt="a fox", steps=1, seed=1, width=32, height=32, frames=5, guidance=1)
    plain, large = (
        next(one for one in engine.generate(request.model_copy(update={"upscale": scale})) if isinstance(one, Picture))
        for scale in (None, 2)
    )
    engine.close()
    assert [frame.size for frame in large.clip.frames] == [(64, 64)] * len(plain.clip.frames)
    upscaler = Upscaler(tiny_network())
    assert np.array_equal(pixels(large.clip.frames[3]), pixels(upscaler(plain.clip.frames[3], 2)))
    with av.open(str(large.video)) as file:
        assert (file.streams.video[0].width, file.streams.video[0].height) == (64, 64)
    assert (large.metadata.width, large.metadata.upscale, large.metadata.frames) == (32, 2, 5)


# ----------------------------------------------------------------------------------- editing


@pytest.mark.parametrize("blur", [0, 4])
def test_what_is_kept_of_an_enlarged_image_stays_bit_identical(tmp_path, folder, blur):
    """Inpainting works at the size of the model; an image of the size of the result keeps its own pixels."""
    pipe = tiny_text_to_image_pipeline()
    engine = Engine({"tiny": "x"}, tmp_path, device="cpu", load=lambda source: pipe, upscalers={"net4": str(folder)})
    original = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    names = {"image": engine.uploads.add(original), "mask": engine.uploads.add(mask.convert("RGB"))}
    request = InpaintRequest(prompt="a cat", steps=2, seed=1, upscale=4, mask_blur=blur, **names)
    picture = next(one for one in engine.generate(request) if isinstance(one, Picture))
    engine.close()
    assert (picture.metadata.width, picture.image.size) == (32, (128, 128))
    kept = slice(64 + 4 * (blur + 1), None) if blur else slice(64, None)
    assert np.array_equal(pixels(picture.image)[:, kept], pixels(original)[:, kept])
    assert np.abs(pixels(picture.image)[:, :64].astype(int) - pixels(original)[:, :64]).mean() > 5


# ------------------------------------------------------------------------------ command line


def test_the_command_line_enlarges_and_repeats(tmp_path, folder, on_the_command_line):
    options = {"prompt": "a fox", "steps": 2, "size": "64x48"}
    run(make_options(**options, upscale=4, upscaler=str(folder)), tmp_path / "a.png", CPU)
    settings = read_picture(tmp_path / "a.png")
    assert (Image.open(tmp_path / "a.png").size, settings.upscaler) == ((256, 192), "net4")
    with pytest.raises(UsageError, match=r"'net4'.*--upscaler.*--upscale 1"):  # a file names no folder
        run(make_options(), tmp_path / "b.png", CPU, tmp_path / "a.png")
    run(make_options(upscaler=str(folder)), tmp_path / "b.png", CPU, tmp_path / "a.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    run(make_options(upscale=1), tmp_path / "c.png", CPU, tmp_path / "a.png")
    assert Image.open(tmp_path / "c.png").size == (64, 48)
    run(make_options(upscale=2), tmp_path / "d.png", CPU, tmp_path / "c.png")
    assert (read_picture(tmp_path / "d.png").upscaler, Image.open(tmp_path / "d.png").size) == (
        "realesr-animevideov3", (128, 96),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"upscale": 9}, "upscale: choose 1 to 4"),
        ({"upscaler": "realesr-animevideov3"}, "--upscaler goes with --upscale"),
        ({"upscale": 2, "upscaler": "nothing"}, "no upscaler 'nothing'.*realesr-animevideov3"),
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(tmp_path, options, says, monkeypatch):
    monkeypatch.setattr(Engine, "_load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=says):
        run(make_options(prompt="a fox", **options), tmp_path / "a.png", CPU)


def test_lines_of_a_file_say_how_much(tmp_path, folder, on_the_command_line, capsys):
    rows = [{"prompt": "a fox", "upscale": 3}, {"prompt": "a cat"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = make_options(steps=1, size="64x48", upscale=2, upscaler=str(folder))
    run_batch(tmp_path / "lines.jsonl", tmp_path / "out", common, CPU)
    sizes = [Image.open(file).size for file in sorted((tmp_path / "out").glob("*.png"))]
    assert sizes == [(192, 144), (128, 96)]
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "a fox", "upscaler": str(folder)}))
    with pytest.raises(UsageError, match="upscaler"):  # it belongs to the command, like the model
        run_batch(tmp_path / "lines.jsonl", tmp_path / "out", common, CPU)


# -------------------------------------------------------------------------------------- API


def test_the_api_enlarges_lists_and_refuses(tmp_path):
    with serving(tmp_path) as server, httpx.Client(base_url=server.address, trust_env=False, timeout=30) as client:
        listed = client.get("/v1/upscalers").json()["data"]
        assert [one["id"] for one in listed] == ["realesr-animevideov3"]
        job = client.post("/v1/jobs", json={**ASK, **SIZE, "upscale": 2}).json()["id"]
        told = client.get(f"/v1/jobs/{job}/events").text
        assert 'event: upscaling\ndata: {"done": 0, "count": 1, "picture": 1, "pictures": 1}' in told
        row = client.get(f"/v1/jobs/{job}").json()["pictures"][0]
        assert (row["settings"]["width"], row["settings"]["upscale"]) == (64, 2)
        (tmp_path / "got.png").write_bytes(client.get(row["url"]).content)
        assert Image.open(tmp_path / "got.png").size == (128, 96)
        for name in (str(tmp_path), "user/repository"):
            answer = client.post("/v1/jobs", json={**ASK, "upscale": 2, "upscaler": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_upscaler")
        answer = client.post("/v1/jobs", json={**ASK, "upscale": 5})
        assert (answer.status_code, "choose 1 to 4" in answer.json()["error"]["message"]) == (422, True)
        body = {"prompt": "a fox", "size": "64x48", "steps": 2, "upscale": 2, "response_format": "url"}
        made = client.post("/v1/images/generations", json=body).json()["data"][0]
        (tmp_path / "made.png").write_bytes(client.get(made["url"]).content)
        assert Image.open(tmp_path / "made.png").size == (128, 96)


# ------------------------------------------------------------------------------------- page


@pytest.fixture
def page(world):
    world.engine.model().result(60)
    sessions = Sessions(None)
    generation = GenerationHandlers(world.engine, WORDS, sessions)
    return SimpleNamespace(generation=generation, handlers=SettingsHandlers(world.engine, WORDS, sessions, generation))


def test_the_switch_is_on_for_built_in_models_only(tmp_path):
    engine = Engine({"stickers": "stickers", "mine": str(tmp_path)}, device="cpu", load=lambda source: FakePipeline())
    assert [usual_upscale(engine, key) for key in ("stickers", "mine", "unknown")] == [4, 1, 1]
    engine.close()
    engine = Engine({"stickers": "stickers"}, device="cpu", load=lambda source: FakePipeline(), upscalers={})
    assert usual_upscale(engine, "stickers") == 1
    engine.close()


def test_a_model_sets_the_switch_and_what_the_browser_remembers_goes_first(tmp_path):
    engine = Engine({"stickers": "stickers"}, tmp_path, device="cpu", load=lambda source: FakePipeline())
    sessions = Sessions(None)
    handlers = SettingsHandlers(engine, WORDS, sessions, GenerationHandlers(engine, WORDS, sessions))
    values = {**PAGE, "model": "stickers"}
    assert handlers.open(None, values)["upscale"]["value"] == 4
    saved = {"model": "stickers", "upscale": 1, "upscaler": "gone"}
    changes = handlers.open(saved, values)
    engine.close()
    assert changes["upscale"]["value"] == 1
    assert "upscaler" not in changes


def test_the_page_enlarges_shows_the_size_and_repeats(page):
    shown = pictures(list(generate_values(page.generation, {**PAGE, "upscale": 2})))[0]
    assert shown.settings.upscale == 2
    stage = page.generation.show(shown)
    assert "128 \u00d7 128" in stage["details"]
    assert "upscaled 2\u00d7" in stage["details"]
    assert 'class="smooth"' in stage["stage"]  # 128 pixels are no pixel art any more
    put = {key: value for key, value in page.handlers.load_settings(str(shown.path)).items() if key in PAGE}
    assert (put["upscale"], put["upscaler"], put["width"]) == (2, "net4", 64)
    again = pictures(list(generate_values(page.generation, {**PAGE, **put})))[0]
    assert again.path.read_bytes() == shown.path.read_bytes()
    plain = pictures(list(generate_values(page.generation, {**PAGE, "upscaler": "net4"})))[0]  # off: it names nobody
    assert (plain.settings.upscale, plain.settings.upscaler) == (None, None)
    assert page.handlers.load_settings(str(plain.path))["upscale"] == 1


def test_starting_from_an_enlarged_image_stays_at_the_models_size(page, world):
    shown = pictures(list(generate_values(page.generation, {**PAGE, "upscale": 4})))[0]
    name = page.handlers.send(shown, "image")["source"]
    assert world.engine.uploads.size(name) == (256, 256)
    model = world.engine.model().result(10)
    assert (model.width, model.side) == (128, 128)
    assert fit_size((512, 512), model) == (128, 128)


def test_an_upscaler_that_is_not_here_is_left_out_with_a_warning(page, world, monkeypatch):
    said = []
    monkeypatch.setattr("apps.studio.settings_handlers.gr.Warning", said.append)
    shown = pictures(list(generate_values(page.generation, {**PAGE, "upscale": 2})))[0]
    foreign = shown.settings.model_copy(update={"upscaler": "of-somebody"})
    changes = page.handlers.load_settings(str(save_sidecar(foreign, world.out / "foreign.png")))
    assert (changes["upscaler"], changes["upscale"]) == ("", 2)
    assert "of-somebody" in said[0]


def test_cells_of_a_grid_are_of_one_size(page, world):
    """Upscaling is no axis, so that the cells differ in what is compared only."""
    assert not {"upscale", "upscaler"} & AXES.keys()
    list(generate_values(page.generation, {**PAGE, "mode": "grid", "upscale": 2, "grid_x_values": "1, 2"}))
    cells = [Image.open(file).size for file in world.out.glob("*.png") if "grid" not in file.name]
    assert cells == [(128, 128)] * 2


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_line_under_the_stage_says_it(language):
    words = Strings(language)
    lines = [progress_line(Upscaling(3, count, 2, pictures, 0.5), words)
             for count, pictures in ((1, 1), (16, 1), (1, 4))]  # fmt: skip
    assert len({text for text, _ in lines}) == 3
    assert all(word in lines[1][0] for word in ("3", "16"))
    assert [share for _, share in lines] == [0.5] * 3


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_shows_the_enlarged_image_of_a_built_in_model(tmp_path):
    """The switch is on when the page opens; turned off, the image comes as the model makes it."""
    with open_browser() as browser, built_in_studio(tmp_path) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        open_page(page, address)
        assert page.locator("#upscale input:checked").get_attribute("value") == "4"
        page.fill("#prompt textarea", "a penguin left of a rocket on purple")
        for scale, side in ((4, 512), (1, 128)):
            page.locator(f"#upscale input[value='{scale}']").check()
            page.evaluate("document.querySelector('#stage .note').textContent = ''")
            page.click("#generate")
            note_says(page, "Done", 120)
            shown = "document.querySelector('#stage .frame img')"
            page.wait_for_function(f"{shown}?.naturalWidth === {side}")
            assert f"{side} \u00d7 {side}" in page.inner_text("#details")
            page.screenshot(path=tmp_path / f"page-{scale}.png", full_page=True)
            assert page.evaluate(f"{shown}.getBoundingClientRect().width") > 300  # shown large either way
        sizes = sorted(Image.open(file).size for file in (tmp_path / "out").glob("*.png"))
        assert sizes == [(128, 128), (512, 512)]
        assert errors == []


@contextmanager
def built_in_studio(folder):
    """Serve the page with the built-in models in a process of its own; yields its address."""
    log = folder / "log"
    command = [sys.executable, "-m", "apps", "studio", "--port", "0", "--no-browser", "--device", "cpu"]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--output", str(folder / "out")], stdout=file, stderr=subprocess.STDOUT, cwd=PROJECT
        )
    try:
        yield wait_for_address(process, log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert "Traceback" not in log.read_text()
