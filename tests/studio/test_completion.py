"""Clips that are completed: handed in, kept where they are known, from the page, over HTTP and in commands."""

import io
from contextlib import suppress
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

from apps.api.app import create_app
from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.commands.serve import _start, check_port
from apps.service import engine as engine_module
from apps.service import limits
from apps.service.engine import Engine
from apps.service.events import Picture
from apps.service.media import Clip, read_mp4, save_mp4
from apps.service.metadata import request_from_settings
from apps.service.requests import REQUEST, VideoCompletionRequest, explain
from apps.service.uploaded_clips import join_frames, read_frames, receive_clip, split_frames
from apps.service.uploads import UploadError
from apps.service.usage import UsageError
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import CONTINUED, SettingsHandlers
from apps.studio.strings import Strings
from tests.pipes.tiny_video import tiny_video_pipeline
from tests.studio.test_page import PAGE, generate_values, pictures

WORDS = Strings("en")
FRAMES = [Image.new("RGB", (32, 32), (25 * shade, 80, 200 - 20 * shade)) for shade in range(8)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model of clips of 8 frames behind the page, with a clip that was handed in."""
    out = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch:
        load = lambda self, source, device, load_options: tiny_video_pipeline(  # noqa: E731
            num_frames=8, num_inference_steps=2, window_frames=8, window_overlap=2
        )
        patch.setattr(engine_module.Engine, "_load_pipeline", load)
        engine = Engine({"stickers": "stickers"}, out, device="cpu")
        engine.model().result(60)
        generation = GenerationHandlers(engine, WORDS, Sessions(None))
        name = engine.uploads.add(join_frames(FRAMES))
        yield SimpleNamespace(
            engine=engine, out=out, generation=generation, name=name,
            handlers=SettingsHandlers(engine, WORDS, Sessions(None), generation),
        )  # fmt: skip
        engine.close()


def made(world, request) -> Picture:
    told = list(world.engine.generate(request))
    found = [event for event in told if isinstance(event, Picture)]
    assert found, told
    return found[0]


def same(first, second) -> list[bool]:
    return [one.tobytes() == other.tobytes() for one, other in zip(first, second, strict=True)]


def test_frames_come_back_as_they_were(world):
    assert same(split_frames(join_frames(FRAMES), 8), FRAMES) == [True] * 8
    with pytest.raises(UploadError, match="no clip"):
        split_frames(join_frames(FRAMES), 7)


@pytest.mark.parametrize(
    ("mask", "known"),
    [("predict(3)", {0, 1, 2}), ("backward(5)", {3, 4, 5, 6, 7}), ("~keyframes(0, -1)", {1, 2, 3, 4, 5, 6})],
)
def test_what_is_kept_comes_out_as_it_was(world, mask, known):
    ask = {"prompt": "a red apple", "seed": 3, "video": world.name, "video_frames": 8, "video_mask": mask}
    picture = made(world, VideoCompletionRequest(**ask))
    is_same = same(picture.clip.frames, FRAMES)
    assert {i for i, one in enumerate(is_same) if one} == known
    again = made(world, request_from_settings(read_mp4(picture.video)))
    assert same(again.clip.frames, picture.clip.frames) == [True] * 8
    assert (picture.metadata.task, picture.metadata.video_mask) == ("video_completion", mask)


def test_a_clip_goes_on_beyond_what_is_given(world):
    picture = made(
        world, VideoCompletionRequest(prompt="a red apple", seed=3, video=world.name, video_frames=8, frames=14)
    )
    assert len(picture.clip.frames) == 14
    assert same(picture.clip.frames[:8], FRAMES) == [True] * 8
    short = made(world, VideoCompletionRequest(
        prompt="a red apple", seed=3, video=world.name, video_frames=8, frames=4, video_mask="predict(2)"
    ))  # fmt: skip
    assert same(short.clip.frames, FRAMES[:4]) == [True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_mask": "explode(3)"}, "video_mask is not understood"),
        ({"frames": 8}, "all 8 frames are given"),
        ({"video_frames": 0}, "video_frames"),
        ({"video": "../../etc/passwd"}, "video"),
    ],
)
def test_wrong_requests_are_refused(world, changes, message):
    ask = {"task": "video_completion", "prompt": "a", "video": world.name, "video_frames": 8, **changes}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is looked at below
        REQUEST.validate_python(ask)
    assert message in explain(caught.value)


def test_clips_of_unknown_origin(world, tmp_path):
    video = save_mp4(Clip(tuple(FRAMES), 8.0), tmp_path / "clip.mp4", None)
    name, count, size = receive_clip(world.engine.uploads, video)
    assert (count, size) == (8, (32, 32))
    assert len(name) == 64
    FRAMES[0].save(tmp_path / "clip.gif", save_all=True, append_images=FRAMES[1:], duration=125)
    assert len(read_frames((tmp_path / "clip.gif").read_bytes())) == 8
    for hostile in (b"", b"no clip", b"GIF89a" + b"\0" * 40, video.read_bytes()[:200], b"RIFF" + b"\0" * 30):
        with pytest.raises(UploadError, match="no clip"):
            read_frames(hostile)
    wide = save_mp4(Clip((Image.new("RGB", (limits.MAX_SIDE + 2, 16)),), 8.0), tmp_path / "wide.mp4", None)
    with pytest.raises(UploadError, match="along a side"):
        read_frames(wide)


def test_a_clip_that_is_given_whole_needs_a_mask_or_more_frames(world):
    told = list(world.engine.generate(VideoCompletionRequest(prompt="a", video=world.name, video_frames=8)))
    assert "all 8 frames are given" in told[-1].message  # the model's own length is 8 too


def test_a_mask_is_of_what_is_given_whatever_the_length(world):
    ask = {"prompt": "a", "video": world.name, "video_frames": 8, "frames": 14, "seed": 1}
    clip = made(world, VideoCompletionRequest(**ask, video_mask="backward(3)")).clip
    assert same(clip.frames[:8], FRAMES) == [False] * 5 + [True] * 3


def test_a_stream_without_a_decoder_and_a_growing_gif_are_refused(tmp_path):
    video = save_mp4(Clip(tuple(FRAMES), 8.0), tmp_path / "clip.mp4", None)
    with pytest.raises(UploadError, match="no clip"):
        read_frames(video.read_bytes().replace(b"avc1", b"zzzz"))
    gif = io.BytesIO()
    FRAMES[0].save(gif, "GIF", save_all=True, append_images=FRAMES[1:3])
    for end in (b"!", b",\0\0", b"!\xf9\x01\0\0", b"!\xfe\x01a\0" * 1000):
        with suppress(UploadError):
            assert {one.size for one in read_frames(gif.getvalue()[:-1] + end)} == {(32, 32)}


def test_the_page_completes_and_continues_clips(world, tmp_path):
    handlers, generation = world.handlers, world.generation
    opened = handlers.load_model_controls("stickers", "video")
    assert (opened["video_file"]["interactive"], opened["video_mask"]["visible"]) == (True, True)
    video = save_mp4(Clip(tuple(FRAMES), 8.0), tmp_path / "clip.mp4", None)
    taken = handlers.take_clip(str(video))
    assert "<img" in taken["video_view"]
    ask = {**PAGE, "mode": "video", "model": "stickers", "prompt": "a red apple", "shape": "32x32", "steps": 2,
           "video": taken["video"], "video_frames": taken["video_frames"], "video_mask": "predict(4)"}  # fmt: skip
    shown = pictures(list(generate_values(generation, ask)))[0]
    assert (shown.settings.task, shown.settings.video_mask, shown.settings.frames) == (
        "video_completion",
        "predict(4)",
        8,
    )
    back = handlers.load_settings(str(shown.clip))
    assert (back["mode"], back["video"], back["video_frames"]) == ("video", taken["video"], 8)
    assert back["video_mask"] == "predict(4)"
    assert "animate" not in str(generation.show(shown)["animate_it"]["value"]).lower()
    going_on = handlers.send(shown, "video")
    assert (going_on["video_frames"], going_on["mode"]) == (CONTINUED, "video")
    more = pictures(list(generate_values(generation, {**ask, **{k: going_on[k] for k in ("video", "video_frames")},
                                                      "video_mask": ""})))[0]  # fmt: skip
    assert more.settings.frames == 8  # the model's own length, of which the first ones are given
    told = list(generate_values(generation, {**ask, "video": None, "video_frames": None}))
    assert any("choose the clip to complete" in str(change.get("problem")) for change in told)
    told = list(generate_values(generation, {**ask, "first_image": world.name}))
    assert any("has its own frames" in str(change.get("problem")) for change in told)
    assert handlers.drop_clip()["video"] is None


def test_over_http(world, tmp_path):
    video = save_mp4(Clip(tuple(FRAMES), 8.0), tmp_path / "clip.mp4", None)
    port = check_port("127.0.0.1", 0)
    server = _start(create_app(world.engine), "127.0.0.1", port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            taken = client.post("/v1/clips", content=video.read_bytes(), headers={"content-type": "video/mp4"})
            assert taken.status_code == 201
            assert (taken.json()["frames"], taken.json()["width"]) == (8, 32)
            refused = client.post("/v1/clips", content=b"no clip", headers={"content-type": "video/mp4"})
            assert refused.status_code == 422
            job = client.post("/v1/jobs", json={
                "task": "video_completion", "prompt": "a red apple", "video": taken.json()["id"], "video_frames": 8,
                "video_mask": "predict(4)",
            })  # fmt: skip
            assert job.status_code == 202
            assert world.engine.stream(job.json()["id"]).wait_closed(60)
            assert client.get(f"/v1/jobs/{job.json()['id']}").json()["state"] == "done"
    finally:
        server.should_exit = True


def test_on_the_command_line(world, tmp_path, monkeypatch):
    video = save_mp4(Clip(tuple(FRAMES), 8.0), tmp_path / "clip.mp4", None)
    given = read_frames(video)
    load = lambda self, source, device, load_options: tiny_video_pipeline(num_frames=8, num_inference_steps=1)  # noqa: E731
    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", load)
    device = DeviceOptions(device="cpu")
    run(make_options(prompt="a fox", video=video, frames=12), tmp_path / "more.webp", device)
    with Image.open(tmp_path / "more.webp") as more:
        assert more.n_frames == 12
    run(make_options(prompt="a fox", video=video, video_mask="predict(3)"), tmp_path / "new.mp4", device)
    assert read_mp4(tmp_path / "new.mp4").video_mask == "predict(3)"
    assert len(given) == 8
    with pytest.raises(UsageError, match="--video-mask goes with --video"):
        run(make_options(prompt="a fox", video_mask="predict(3)"), tmp_path / "x.mp4", device)
    (tmp_path / "note.txt").write_text("no clip")
    with pytest.raises(UsageError, match="no clip"):
        run(make_options(prompt="a fox", video=tmp_path / "note.txt"), tmp_path / "x.mp4", device)
