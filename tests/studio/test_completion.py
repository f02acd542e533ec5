"""Clips that are completed: handed in, kept where they are known, from the page, over HTTP and in commands."""

import io
import json
from contextlib import suppress
from html import unescape
from types import SimpleNamespace

import av
import httpx
import numpy as np
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
from apps.service.uploaded_clips import cut_note, join_frames, read_clip, receive_clip, split_frames
from apps.service.uploads import UploadError, UploadStore
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


def save_webm(path, codec, form="webm"):
    """Write the frames as a browser would, without the settings of an MP4 of ours."""
    with av.open(str(path), "w", format=form) as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.bit_rate = 10**6
        for frame in FRAMES:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())
    return path


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
    clip = receive_clip(world.engine.uploads, video)
    assert (clip.frames, clip.size, clip.notes) == (8, (32, 32), ())
    assert len(clip.name) == 64
    FRAMES[0].save(tmp_path / "clip.gif", save_all=True, append_images=FRAMES[1:], duration=125)
    assert len(read_clip((tmp_path / "clip.gif").read_bytes())[0]) == 8
    for hostile in (b"", b"no clip", b"GIF89a" + b"\0" * 40, video.read_bytes()[:200], b"RIFF" + b"\0" * 30):
        with pytest.raises(UploadError, match="no clip"):
            read_clip(hostile)
    wide = save_mp4(Clip((Image.new("RGB", (limits.MAX_SIDE + 2, 16)),), 8.0), tmp_path / "wide.mp4", None)
    with pytest.raises(UploadError, match="along a side"):
        read_clip(wide)


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_a_webm_is_a_clip_too(world, tmp_path, codec):
    video = save_webm(tmp_path / "clip.webm", codec)
    assert video.read_bytes()[:4] == bytes.fromhex("1a45dfa3")  # of EBML, which no MP4 begins with
    clip = receive_clip(world.engine.uploads, video)
    assert (clip.frames, clip.size) == (8, (32, 32))
    for found, given in zip(split_frames(world.engine.uploads.get(clip.name), 8), FRAMES, strict=True):
        assert np.abs(np.asarray(found).astype(int) - np.asarray(given)).mean() < 6  # what the codec rounds
    asked = {"prompt": "a red apple", "seed": 3, "video": clip.name, "video_frames": 8, "video_mask": "predict(3)"}
    picture = made(world, VideoCompletionRequest(**asked))
    kept = split_frames(world.engine.uploads.get(clip.name), 8)[:3]
    assert same(picture.clip.frames[:3], kept) == [True] * 3


def test_a_codec_that_is_not_on_the_list_is_refused_in_the_same_container(tmp_path):
    video = save_webm(tmp_path / "clip.webm", "ffv1", "matroska")
    with pytest.raises(UploadError, match="no clip"):
        read_clip(video)


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
        read_clip(video.read_bytes().replace(b"avc1", b"zzzz"))
    gif = io.BytesIO()
    FRAMES[0].save(gif, "GIF", save_all=True, append_images=FRAMES[1:3])
    for end in (b"!", b",\0\0", b"!\xf9\x01\0\0", b"!\xfe\x01a\0" * 1000):
        with suppress(UploadError):
            assert {one.size for one in read_clip(gif.getvalue()[:-1] + end)[0]} == {(32, 32)}


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
            assert taken.json()["notes"] == []
            webm = save_webm(tmp_path / "clip.webm", "libvpx-vp9").read_bytes()
            other = client.post("/v1/clips", content=webm, headers={"content-type": "video/webm"})
            assert (other.status_code, other.json()["frames"], other.json()["height"]) == (201, 8, 32)
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
    given, _ = read_clip(video)
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


# ------------------------------------------------------------------ clips that are too long


@pytest.fixture(scope="module")
def too_long(tmp_path_factory):
    """A clip of one frame more than is taken, and one of just as many, as files."""
    folder, most = tmp_path_factory.mktemp("long"), limits.MAX_FRAMES
    frames = [Image.new("RGB", (32, 32), (i % 256, 80, 200 - i % 200)) for i in range(most + 1)]
    return SimpleNamespace(
        longer=save_mp4(Clip(tuple(frames), 8.0), folder / "longer.mp4", None),
        whole=save_mp4(Clip(tuple(frames[:-1]), 8.0), folder / "whole.mp4", None),
    )


def asked_of(clip, **changes):
    shorter = {"frames": 4, "video_mask": "predict(2)", "seed": 3}
    return {"prompt": "a red apple", "video": clip.name, "video_frames": clip.frames, **shorter, **changes}


def test_a_clip_that_is_too_long_says_so_when_it_is_taken_and_on_what_is_made_of_it(world, too_long):
    uploads = world.engine.uploads
    clip = receive_clip(uploads, too_long.longer)
    assert (clip.frames, clip.notes) == (limits.MAX_FRAMES, (cut_note(),))
    assert str(limits.MAX_FRAMES) in cut_note()
    picture = made(world, VideoCompletionRequest(**asked_of(clip)))
    assert picture.notes == (cut_note(),)
    assert json.loads(world.engine.history("local", 1)[0].notes) == [cut_note()]
    whole = receive_clip(uploads, too_long.whole)
    assert (whole.frames, whole.notes) == (limits.MAX_FRAMES, ())
    assert made(world, VideoCompletionRequest(**asked_of(whole))).notes == ()


@pytest.mark.parametrize("is_on_disk", [True, False])
def test_the_beginning_of_a_clip_is_known_until_it_is_handed_in_whole(tmp_path, is_on_disk):
    store, image = UploadStore(tmp_path if is_on_disk else None), Image.new("RGB", (8, 8), (1, 2, 3))
    name = store.add(image, is_cut=True)
    assert store.is_cut(name)
    assert store.add(image) == name
    assert not store.is_cut(name)
    assert not store.is_cut("../../etc/passwd")


def test_the_page_says_that_a_clip_is_cut(world, too_long):
    taken = world.handlers.take_clip(str(too_long.longer))
    said = WORDS("video.cut", most=limits.MAX_FRAMES)
    assert said in unescape(taken["video_view"])
    handed_in = {key: taken[key] for key in ("video", "video_frames")}
    page = {**PAGE, "mode": "video", "model": "stickers", "prompt": "a red apple", "shape": "32x32", "steps": 2,
            "frames": 4, "video_mask": "predict(2)", **handed_in}  # fmt: skip
    shown = pictures(list(generate_values(world.generation, page)))[0]
    for language in ("en", "zh"):
        words = Strings(language)
        details = unescape(GenerationHandlers(world.engine, words, Sessions(None)).show(shown)["details"])
        assert details.count(words("video.cut", most=limits.MAX_FRAMES)) == 1
    assert said in unescape(world.handlers.load_settings(str(shown.clip))["video_view"])
    assert said not in unescape(world.handlers.drop_clip()["video_view"])


def test_the_api_says_that_a_clip_is_cut(world, too_long):
    port = check_port("127.0.0.1", 0)
    server = _start(create_app(world.engine), "127.0.0.1", port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
            sent = {"content": too_long.longer.read_bytes(), "headers": {"content-type": "video/mp4"}}
            taken = client.post("/v1/clips", **sent).json()
            assert (taken["frames"], taken["notes"]) == (limits.MAX_FRAMES, [cut_note()])
            clip = SimpleNamespace(name=taken["id"], frames=taken["frames"])
            job = client.post("/v1/jobs", json={"task": "video_completion", **asked_of(clip)}).json()
            assert world.engine.stream(job["id"]).wait_closed(60)
            assert client.get(f"/v1/jobs/{job['id']}").json()["pictures"][0]["notes"] == [cut_note()]
    finally:
        server.should_exit = True


def test_the_command_line_says_that_a_clip_is_cut(too_long, tmp_path, monkeypatch, capsys):
    load = lambda self, source, device, load_options: tiny_video_pipeline(num_frames=8, num_inference_steps=1)  # noqa: E731
    monkeypatch.setattr(engine_module.Engine, "_load_pipeline", load)
    options = make_options(prompt="a fox", video=too_long.longer, frames=4, video_mask="predict(2)")
    run(options, tmp_path / "a.mp4", DeviceOptions(device="cpu"))
    told = " ".join(capsys.readouterr().err.split())
    assert f"warning {cut_note()}" in told
    run(options, tmp_path / "b.mp4", DeviceOptions(device="cpu"), json_output=True)
    assert json.loads(capsys.readouterr().out)["pictures"][0]["notes"] == [cut_note()]
    whole = make_options(prompt="a fox", video=too_long.whole, frames=4, video_mask="predict(2)")
    run(whole, tmp_path / "c.mp4", DeviceOptions(device="cpu"))
    assert "warning" not in capsys.readouterr().err
