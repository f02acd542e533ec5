"""Clips: played in the page, served from the output folder only, and generated again from the MP4 alone."""

from __future__ import annotations

import base64
import ctypes
import io
import platform
import shutil
from types import SimpleNamespace

import av
import httpx
import numpy as np
import pytest
from PIL import Image

from apps.api.app import create_app
from apps.api.messages import event_message
from apps.commands.batch import read_lines
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.commands.options import read_settings
from apps.commands.outputs import save
from apps.commands.serve import _start, check_port
from apps.service import engine as engine_module
from apps.service import job_runner
from apps.service.defaults import resolve_defaults
from apps.service.engine import Engine
from apps.service.events import ClipPart, Picture, Step, Upscaling
from apps.service.gallery_store import Person, Wanted
from apps.service.media import Clip, read_mp4, save_mp4
from apps.service.metadata import MetadataError, request_from_settings
from apps.service.option_values import parse_timeline
from apps.service.requests import ImageToImageRequest, TextToImageRequest
from apps.service.styles import apply_style, load_styles
from apps.service.uploads import UploadError
from apps.studio import views
from apps.studio.app import mount
from apps.studio.gallery_tab import GalleryHandlers
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.live import PictureView
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from tests.families.tiny import tiny_pipeline
from tests.pipes.tiny_video import tiny_video_pipeline
from tests.studio.browsers import fill_number, open_browser
from tests.studio.test_page import PAGE, TAB, generate_values, pictures
from tests.studio.test_server import note_says, open_page

WORDS = Strings("en")
ASK = {
    **PAGE, "mode": "video", "model": "stickers", "prompt": "a red apple", "shape": "64x32", "frames": 9, "steps": 2,
    "guidance": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model of clips behind the page and the API; a command line with a pipeline of the same weights."""
    out = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine_module.Engine, "_load_pipeline", lambda self, source, device, load_options: tiny_pipeline("wan")
        )
        engine = Engine({"stickers": "stickers"}, out, device="cpu")
        engine.model().result(60)
        sessions, port = Sessions(None), check_port("127.0.0.1", 0)
        generation = GenerationHandlers(engine, WORDS, sessions)
        app = create_app(engine)
        mount(app, engine)
        server = _start(app, "127.0.0.1", port)
        yield SimpleNamespace(
            engine=engine, out=out, generation=generation, address=f"http://127.0.0.1:{port}",
            handlers=SettingsHandlers(engine, WORDS, sessions, generation),
        )  # fmt: skip
        server.should_exit = True
        engine.close()


@pytest.fixture(scope="module")
def painted(world):
    told = list(generate_values(world.generation, ASK))
    return SimpleNamespace(shown=pictures(told)[0], told=told)


def frames_of(path):
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in file.decode(video=0)]


def test_the_stage_plays_the_clip_with_its_strip_as_poster(world, painted):
    stage = [changes["stage"] for changes in painted.told if "stage" in changes][-1]
    assert "Done in" in stage
    assert f'<video src="{views.file_address(painted.shown.clip)}"' in stage
    assert f'poster="{views.file_address(painted.shown.path)}"' in stage
    shown = world.generation.show(painted.shown)
    assert shown["save"]["value"] == str(painted.shown.clip)
    assert shown["start_from"]["interactive"] is False  # a strip of frames is no image to start from
    assert "9 frames, 16 a second" in shown["details"]
    (newest, *_) = world.engine.gallery.page(Person("local"), Wanted(), 1)
    assert newest.kind == "clip"
    gallery = GalleryHandlers(world.engine, Sessions(None), world.generation)
    assert "<video" in gallery.pick(TAB, f"{newest.number}")["stage"]


def test_a_clip_whose_file_is_gone_is_shown_by_its_frames(painted, world, tmp_path):
    moved = tmp_path / "there.mp4"
    shutil.move(painted.shown.clip, moved)
    try:
        assert "<video" not in world.generation.show(painted.shown)["stage"]
        assert painted.shown.clip is None
    finally:
        shutil.move(moved, painted.shown.path.with_suffix(".mp4"))


def test_an_mp4_puts_the_page_in_place_and_is_painted_again(world, painted, tmp_path):
    """The bar for clips: the same frames in the studio and on the command line, from the MP4 alone."""
    clip = painted.shown.clip
    assert read_mp4(clip) == painted.shown.settings
    shown = {key: value for key, value in world.handlers.load_settings(str(clip)).items() if key in PAGE}
    assert (shown["frames"], shown["steps"], shown["mode"]) == (9, 2, "video")
    again = pictures(list(generate_values(world.generation, {**PAGE, **shown})))[0]
    assert again.settings == painted.shown.settings
    assert Image.open(again.path).tobytes() == Image.open(painted.shown.path).tobytes()
    assert frames_of(again.clip) == frames_of(clip)
    run(make_options(), tmp_path / "cli.mp4", DeviceOptions(device="cpu"), settings=clip)
    assert frames_of(tmp_path / "cli.mp4") == frames_of(clip)
    assert read_mp4(tmp_path / "cli.mp4") == painted.shown.settings
    run(make_options(), tmp_path / "mute.mp4", DeviceOptions(device="cpu"), settings=clip, keep_settings=False)
    with pytest.raises(MetadataError, match="no settings"):  # settings that should not be in the file
        read_mp4(tmp_path / "mute.mp4")


def test_the_api_serves_the_clip(world, painted, tmp_path):
    with httpx.Client(base_url=world.address, trust_env=False, timeout=30) as client:
        row = client.get("/v1/jobs", params={"limit": 100}).json()["jobs"][-1]["pictures"][0]
        answer = client.get(row["clip"])
        assert answer.headers["content-type"] == "video/mp4"
        assert answer.content == painted.shown.clip.read_bytes()
        part = client.get(row["clip"], headers={"Range": "bytes=0-99"})  # what players ask for
        assert (part.status_code, len(part.content)) == (206, 100)
        assert client.get(row["clip"].replace("clips/0", "clips/3")).status_code == 404
        outside = tmp_path / "outside.mp4"
        outside.write_bytes(painted.shown.clip.read_bytes())
        assert client.get(views.file_address(outside)).status_code == 404
        inside = client.get(views.file_address(painted.shown.clip))
        assert inside.content == painted.shown.clip.read_bytes()


def test_a_clip_begins_with_a_picture(tmp_path):
    """Image to video: the same weights as text to video where diffusers has a pipeline for both."""
    pipe = tiny_pipeline("ltx")
    engine = Engine({"stickers": "stickers"}, tmp_path, device="cpu", load=lambda source: pipe)
    model = engine.model().result(60)
    assert model.tasks == ("text_to_image", "image_to_image")
    assert type(model.pipe_for("image_to_image")).__name__ == "LTXImageToVideoPipeline"
    sessions = Sessions(None)
    generation = GenerationHandlers(engine, WORDS, sessions)
    handlers = SettingsHandlers(engine, WORDS, sessions, generation)
    opened = handlers.load_model_controls("stickers", "image")
    assert (opened["mode"], opened["need"]) == ("video", "")  # where models of clips are at home
    assert (opened["first_image_file"]["interactive"], opened["last_image_file"]["interactive"]) == (True, False)
    Image.new("RGB", (64, 32), (200, 30, 30)).save(tmp_path / "red.png")
    taken = handlers.take_end("first_image", str(tmp_path / "red.png"))
    assert "<img" in taken["first_image_view"]
    assert handlers.drop_end("first_image")["first_image"] is None
    ask = {**ASK, "first_image": taken["first_image"]}
    first = pictures(list(generate_values(generation, ask)))[0]
    assert (first.settings.task, first.settings.frames, first.settings.strength) == ("image_to_image", 9, None)
    assert first.clip is not None
    other = engine.uploads.add(Image.new("RGB", (64, 32), (30, 30, 200)))
    assert frames_of(pictures(list(generate_values(generation, {**ask, "first_image": other})))[0].clip) != frames_of(
        first.clip
    )
    shown = {key: value for key, value in handlers.load_settings(str(first.clip)).items() if key in PAGE}
    again = pictures(list(generate_values(generation, {**PAGE, **shown})))[0]
    assert frames_of(again.clip) == frames_of(first.clip)
    assert "makes clips" in handlers.check_support("stickers", "text")["need"]
    refused = list(engine.generate(request_from_settings(first.settings, strength=0.5)))[-1]
    assert (refused.code, "strength" in refused.message) == ("bad_request", True)
    engine.close()


@pytest.mark.slow
@pytest.mark.browser
def test_a_browser_plays_it(world, tmp_path):
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        open_page(page, world.address + "/zh/")  # leaves settings behind, which the next page takes up
        open_page(page, world.address)
        errors.clear()  # calls of the page that was left are broken off, which the browser notes as an error
        page.fill("#prompt textarea", "a red apple")
        for name, value in (("frames", "9"), ("steps", "2")):
            page.fill(f"#{name} input[type=number]", value)
            page.press(f"#{name} input[type=number]", "Tab")
        page.locator("#shape label", has_text="Custom").click()
        for name, value in (("width", "64"), ("height", "32")):
            page.fill(f"#{name} input[type=number]", value)
            page.press(f"#{name} input[type=number]", "Tab")
        page.click("#generate")
        note_says(page, "Done", 120)
        page.wait_for_function("document.querySelector('#stage video')?.readyState >= 2")
        video = "document.querySelector('#stage video')"
        assert page.evaluate(f"[{video}.videoWidth, {video}.videoHeight]") == [256, 128]  # upscaled, as built-in models
        assert page.evaluate(f"{video}.duration") == pytest.approx(9 / 16, abs=0.07)
        page.wait_for_function(f"{video}.currentTime > 0")
        page.wait_for_function("document.querySelectorAll('#stage .film button canvas').length === 8")
        page.click("#stage .film button:nth-child(5)")
        page.wait_for_function(f"{video}.paused && Math.abs({video}.currentTime - {video}.duration * 4.5 / 8) < 0.02")
        address = page.evaluate(f"{video}.currentSrc")
        assert address.startswith(f"{world.address}/outputs/")
        newest = max(world.out.glob("*.mp4"), key=lambda file: file.stat().st_mtime)
        assert httpx.get(address, trust_env=False).content == newest.read_bytes()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.reload()
        page.locator(".chip:visible").first.wait_for()
        fill_number(page, "#steps input[type=number]", "7")
        page.set_input_files("#settings input[type=file]", newest)
        page.wait_for_function("document.querySelector('#steps input[type=number]').value === '2'")
        assert errors == []
        assert [url for url in requests if not url.startswith((world.address, "data:", "blob:"))] == []


def test_a_file_depends_on_its_frames_not_on_what_is_left_in_memory(tmp_path):
    """Memory of new objects is filled with several values, so that whoever reads what it did not write is seen."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("no glibc, which fills memory on request")
    mallopt, fill = ctypes.CDLL(None).mallopt, -6  # M_PERTURB
    random = np.random.default_rng(11)
    still = random.random((96, 96, 3))  # sides of 6 macroblocks, less than the 8 that AVX-512 code takes at a time
    noisy = (255 * (0.7 * still + 0.3 * random.random((96, 96, 3))) for _ in range(8))
    clip = Clip(tuple(Image.fromarray(pixels.astype(np.uint8)) for pixels in noisy), 8.0)
    try:
        files = set()
        for value in (1, 85, 170, 254):
            mallopt(fill, value)
            files.add(save_mp4(clip, tmp_path / "clip.mp4", None).read_bytes())
    finally:
        mallopt(fill, 0)
    assert len(files) == 1


# ------------------------------------------------------------------ long clips, part by part


@pytest.fixture(scope="module")
def long_world(tmp_path_factory):
    """A tiny model that makes a clip of 20 frames in three windows, behind the page."""
    out = tmp_path_factory.mktemp("long")
    settings = {"num_frames": 20, "window_frames": 8, "window_overlap": 2, "num_inference_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            engine_module.Engine,
            "_load_pipeline",
            lambda self, source, device, load_options: tiny_video_pipeline(**settings),
        )
        engine = Engine({"stickers": "stickers"}, out, device="cpu")
        engine.model().result(60)
        generation = GenerationHandlers(engine, WORDS, Sessions(None))
        yield SimpleNamespace(engine=engine, out=out, generation=generation)
        engine.close()


def test_finished_frames_come_before_later_ones_are_begun(long_world):
    told = list(long_world.engine.generate(TextToImageRequest(prompt="a red apple", seed=3)))
    kinds = [type(event).__name__ for event in told if isinstance(event, Step | ClipPart | Picture)]
    assert kinds == ["Step"] * 2 + ["ClipPart"] + ["Step"] * 2 + ["ClipPart"] + ["Step"] * 2 + ["Picture"]
    parts = [event for event in told if isinstance(event, ClipPart)]
    assert [(part.start, len(part.frames), part.total) for part in parts] == [(0, 8, 20), (8, 6, 20)]
    steps = [event for event in told if isinstance(event, Step)]
    assert [(step.step, step.steps) for step in steps] == [(number, 6) for number in range(1, 7)]
    (picture,) = (event for event in told if isinstance(event, Picture))
    assert len(picture.clip.frames) == 20
    shown = [frame for part in parts for frame in part.frames]
    assert [frame.tobytes() for frame in shown] == [frame.tobytes() for frame in picture.clip.frames[:14]]
    assert len(frames_of(picture.video)) == 20


def partial_files(world):
    return list(world.engine.output_dir.glob("*-partial-*.mp4"))


def test_finished_frames_can_be_watched_in_a_file_while_later_ones_are_made(long_world, monkeypatch):
    seen = []

    class Watched(job_runner.ClipWriter):
        def append(self, frames):
            super().append(frames)
            seen.extend(len(frames_of(file)) for file in partial_files(long_world))

    monkeypatch.setattr(job_runner, "ClipWriter", Watched)
    told = list(long_world.engine.generate(TextToImageRequest(prompt="a red apple", seed=3)))
    assert seen == [7, 13]  # of 8 and 14: the last one is written when its duration is known, with the next
    (picture,) = (event for event in told if isinstance(event, Picture))
    assert len(frames_of(picture.video)) == 20
    assert partial_files(long_world) == []


@pytest.mark.parametrize(
    ("error", "left"), [(job_runner.StopRequestedError(), []), (RuntimeError("out of memory"), [8])]
)
def test_what_was_finished_is_left_when_the_work_breaks_not_when_it_is_stopped(long_world, monkeypatch, error, left):
    def broken(model, inputs, signals, on_step, offload, on_part):
        on_part(0, 20, [Image.new("RGB", (32, 32), "teal")] * 8)
        raise error

    monkeypatch.setattr(job_runner, "run_pipeline", broken)
    list(long_world.engine.generate(TextToImageRequest(prompt="a red apple", seed=4)))
    assert [len(frames_of(file)) for file in partial_files(long_world)] == left
    for file in partial_files(long_world):
        file.unlink()


def test_the_page_plays_what_is_finished(long_world):
    ask = {**ASK, "shape": "32x32", "frames": 20}
    told = [changes["stage"] for changes in generate_values(long_world.generation, ask) if "stage" in changes]
    playing = [number for number, stage in enumerate(told) if "data:image/webp" in stage]
    assert playing
    assert "<video" not in told[playing[0]]
    assert not any('class="preview"' in told[number] for number in playing)  # previews are blurred
    assert "8 of 20 frames are finished" in told[playing[0]]
    assert "<video" in told[-1]
    assert "data:image/webp" not in told[-1]


def test_an_unfinished_clip_lets_steps_pass_and_shows_its_upscaling():
    view = PictureView((32, 32), WORDS, None, None)
    frames = tuple(Image.new("RGB", (32, 32), (20 * shade, 0, 0)) for shade in range(3))
    step, part = Step(2, 6, 2, 2, None, 1.0), ClipPart(0, frames, 9, 8.0, 2, 2)
    assert part.share == pytest.approx((1 + 3 / 9) / 2)
    assert view.is_due(step)
    view.take_part(part)
    assert [view.is_due(one) for one in (step, part, Upscaling(0, 4, 2, 2, 1.0))] == [False, True, True]
    drawn = view.draw("", 0.5)
    assert "data:image/webp" in drawn
    assert view.draw("", 0.6).count(view.playing) == 1  # encoded once
    view.take(Step(1, 6, 1, 2, frames[0], 1.0))  # another clip: what was finished of the one before is gone
    assert view.is_due(step)
    assert "data:image/png" in view.draw("", 0.1)


def test_parts_are_small_views(long_world, monkeypatch):
    monkeypatch.setattr(job_runner, "PART_SIDE", 8)
    told = list(long_world.engine.generate(TextToImageRequest(prompt="a red apple", seed=3)))
    assert {frame.size for event in told if isinstance(event, ClipPart) for frame in event.frames} == {(8, 8)}
    assert next(event for event in told if isinstance(event, Picture)).clip.frames[0].size == (32, 32)


def test_a_timeline_that_grows_too_long_in_a_style_is_refused_before_anything_is_generated(long_world):
    style = max(load_styles(), key=lambda name: len(apply_style(name, "", "")[0]))
    timeline = " | ".join(f"{frame}: {'a boat ' * 14}" for frame in range(1, 19))
    told = list(long_world.engine.generate(TextToImageRequest(prompt="a", timeline=timeline, style=style)))
    assert not any(isinstance(event, Step) for event in told)
    assert "characters in this style" in told[-1].message


def test_parts_are_events_of_the_api():
    frames = tuple(Image.new("RGB", (8, 8), (20 * shade, 0, 0)) for shade in range(3))
    name, data = event_message("job", ClipPart(5, frames, 20, 8.0))
    assert (name, data["start"], data["frames"], data["total"]) == ("part", 5, 3, 20)
    kind, _, encoded = data["clip"].partition(";base64,")
    assert kind == "data:image/webp"
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as clip:
        assert clip.n_frames == 3
        clip.load()
        assert clip.info["duration"] == 125


def test_a_timeline_changes_the_prompt_of_later_windows(long_world):
    def frames(**more):
        told = long_world.engine.generate(TextToImageRequest(prompt="a red apple", seed=3, **more))
        return next(event for event in told if isinstance(event, Picture))

    plain, changed = frames(), frames(timeline="12: a green pear\n")
    assert changed.metadata.timeline == "12: a green pear"
    same = [a.tobytes() == b.tobytes() for a, b in zip(plain.clip.frames, changed.clip.frames, strict=True)]
    assert all(same[:14])  # windows begin at frames 0, 8 and 14
    assert not any(same[14:])
    again = next(
        event
        for event in long_world.engine.generate(request_from_settings(read_mp4(changed.video)))
        if isinstance(event, Picture)
    )
    assert frames_of(again.video) == frames_of(changed.video)
    told = list(long_world.engine.generate(TextToImageRequest(prompt="a red apple", timeline="40: a boat")))
    assert "frame 40 of a clip of 20" in told[-1].message
    unseen = TextToImageRequest(prompt="a red apple", timeline="12: a green pear | 18: a boat")
    told = list(long_world.engine.generate(unseen))
    assert "would never be seen" in told[-1].message
    assert "[0, 8, 14]" in told[-1].message


def test_the_page_holds_both_ends_of_a_clip_and_its_later_prompts(long_world):
    """What a clip begins and ends with, and its timeline, go from the page into the file, and back."""
    ends = {
        name: long_world.engine.uploads.add(Image.new("RGB", (32, 32), colour))
        for name, colour in (("first_image", "red"), ("last_image", "blue"))
    }
    handlers = SettingsHandlers(long_world.engine, WORDS, Sessions(None), long_world.generation)
    opened = handlers.load_model_controls("stickers", "video")
    assert (opened["frames"]["value"], opened["timeline"]["visible"]) == (20, True)
    assert opened["last_image_file"]["interactive"] is True
    ask = {**ASK, "shape": "32x32", "frames": 20, "timeline": "12: a pear", **ends}
    shown = pictures(list(generate_values(long_world.generation, ask)))[0]
    settings = shown.settings
    assert (settings.task, settings.image, settings.last_image) == ("image_to_image", *ends.values())
    assert settings.timeline == "12: a pear"
    back = handlers.load_settings(str(shown.clip))
    assert (back["mode"], back["first_image"], back["last_image"]) == ("video", *ends.values())
    assert "<img" in back["last_image_view"]
    kept = {name: value for name, value in back.items() if name in PAGE}
    again = pictures(list(generate_values(long_world.generation, {**PAGE, **kept})))[0]
    assert frames_of(again.clip) == frames_of(shown.clip)


def test_a_style_holds_for_later_prompts_too(long_world):
    style = next(iter(load_styles()))
    request = TextToImageRequest(prompt="a red apple", timeline="12: a pear\n\n 14:  a boat ", style=style)
    settled = resolve_defaults(request, long_world.engine.model().result(), long_world.engine.uploads)
    later = [prompt for _, prompt in parse_timeline(settled.timeline)]
    assert [settled.prompt.replace("a red apple", text) for text in ("a pear", "a boat")] == later


def test_a_clip_that_is_ended_early_is_recorded_with_the_frames_asked_for(long_world):
    told = list(long_world.engine.generate(TextToImageRequest(prompt="a red apple", seed=3, finish_after=3)))
    picture = next(event for event in told if isinstance(event, Picture))
    assert len(picture.clip.frames) == 14  # two windows, the second one ended after its first step
    assert (picture.metadata.frames, picture.metadata.finish_after) == (20, 3)
    told = long_world.engine.generate(request_from_settings(picture.metadata))
    again = next(event for event in told if isinstance(event, Picture))
    assert frames_of(again.video) == frames_of(picture.video)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a boat", "write FRAME: PROMPT"),
        ("8: a | 8: b", "rising order"),
        ("0: a", "rising order"),
        ("3: ", "FRAME"),
        ("|", "at least 1"),
        ("1: " + "a" * 1999, "2000"),
        (": a", "FRAME"),
    ],
)
def test_timelines_of_another_form_are_refused(text, problem):
    with pytest.raises(ValueError, match=problem):
        TextToImageRequest(prompt="a red apple", timeline=text)


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_animations_play_for_ever_and_carry_their_settings(ending, tmp_path, long_world):
    told = long_world.engine.generate(TextToImageRequest(prompt="a red apple", seed=3))
    picture = next(event for event in told if isinstance(event, Picture))
    (path,) = save(picture, tmp_path / f"clip.{ending}")
    assert read_settings(path) == picture.metadata
    with Image.open(path) as clip:
        assert clip.n_frames == 20
        assert clip.info["loop"] == 0
        clip.seek(1)
        clip.load()
        assert clip.info["duration"] == pytest.approx(125, abs=5)
        error = np.abs(np.asarray(clip.convert("RGB"), float) - np.asarray(picture.clip.frames[1], float)).mean()
    assert error < 20  # 256 colours a frame, or lossy compression
    (bare,) = save(picture, tmp_path / f"bare.{ending}", keep_settings=False)
    with pytest.raises(MetadataError, match="carries no settings"):
        read_settings(bare)
    assert sorted(one.name for one in tmp_path.iterdir()) == [f"bare.{ending}", f"clip.{ending}"]


def test_what_a_gif_says_is_checked(tmp_path):
    Image.new("P", (8, 8)).save(tmp_path / "a.gif", comment=b"{" + b"9" * 9_000_000)  # Pillow alone takes some seconds
    with pytest.raises(MetadataError):
        read_settings(tmp_path / "a.gif")
    for comment in (b"{broken", b"{" + b"9" * 70_000, "{\u00ff".encode("latin-1"), b"hello"):
        Image.new("P", (8, 8)).save(tmp_path / "a.gif", comment=comment)
        with pytest.raises(MetadataError):
            read_settings(tmp_path / "a.gif")


def test_a_clip_begins_and_ends_with_images(long_world, tmp_path):
    first, last = (Image.new("RGB", (32, 32), colour) for colour in ("teal", "orange"))
    names = [long_world.engine.uploads.add(image) for image in (first, last)]
    told = list(
        long_world.engine.generate(
            ImageToImageRequest(prompt="a red apple", image=names[0], last_image=names[1], seed=3, frames=9)
        )
    )
    picture = next(event for event in told if isinstance(event, Picture))
    assert picture.clip.frames[0].tobytes() == first.tobytes()
    assert picture.clip.frames[-1].tobytes() == last.tobytes()
    assert picture.metadata.last_image == names[1]
    with pytest.raises(UploadError):
        long_world.engine.submit(TextToImageRequest(prompt="a red apple", last_image="0" * 64))


def test_files_of_prompts_name_last_images_beside_them(tmp_path):
    Image.new("RGB", (32, 32), "orange").save(tmp_path / "end.png")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a red apple", "last_image": "end.png", "frames": 9}\n')
    (line,) = read_lines(tmp_path / "lines.jsonl", make_options())
    assert line.options.last_image == tmp_path / "end.png"
