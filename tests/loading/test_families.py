"""Folders of foreign pipelines load, generate, show previews and stop: from Python, through the engine, on the CLI."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from PIL import Image

from apps import cli
from apps.service.engine import Engine
from apps.service.events import Done, Failed, Picture, Step, Stopped
from apps.service.media import read_mp4
from apps.service.metadata import read_picture
from apps.service.requests import TextToImageRequest
from pipelines import load_pipeline
from pipelines.previews import preview
from tests.families.tiny import tiny_call

PICTURES = ("flux", "sd3", "pixart", "sana", "qwen_image")
CLIPS = ("wan", "ltx", "cogvideox")
HEIGHT, WIDTH, FRAMES = 32, 64, 9


@pytest.fixture(scope="module", params=[*PICTURES, *CLIPS])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family, folder_of):
    return load_pipeline(folder_of(family), device="cpu", dtype="float32")


@pytest.fixture
def engine(pipe, tmp_path):
    return Engine({"tiny": "somewhere"}, tmp_path, device="cpu", load=lambda source: pipe)


@pytest.fixture
def decodes(pipe, monkeypatch):
    """How often the autoencoder has decoded."""
    count = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kwargs: (count.append(1), decode(*args, **kwargs))[1])
    return count


def ask(family, **settings):
    frames = {"frames": FRAMES} if family in CLIPS else {}
    return TextToImageRequest(
        **{"prompt": "a red apple", "steps": 3, "seed": 1, "height": HEIGHT, "width": WIDTH, **frames, **settings}
    )


def old_style(callback):
    """For pipelines whose callback gets the latents themselves."""
    return lambda step, timestep, latents: callback(None, step, timestep, {"latents": latents})


class StopPaintingError(Exception):
    """What a caller may raise to stop a pipeline of diffusers."""


def test_python_previews_and_stops(family, pipe):
    call = tiny_call(family, num_inference_steps=3)
    height, width, frames = call["height"], call["width"], call.get("num_frames")
    shown = []

    def watch(_, step, timestep, tensors):
        shown.extend(preview(pipe, tensors["latents"], height, width, frames))
        if step == 1:
            raise StopPaintingError
        return {}

    modern = family != "pixart"
    with pytest.raises(StopPaintingError):
        pipe(**call, **({"callback_on_step_end": watch} if modern else {"callback": old_style(watch)}))
    assert len(shown) == 2
    for picture in shown:
        assert isinstance(picture, Image.Image)
        # one pixel a latent cell, in the image's proportions
        assert picture.width / picture.height == width / height
        assert width // picture.width in (2, 4, 8, 16, 32)
        assert len(picture.getcolors(1 << 16)) > picture.width
    assert len(pipe(**call)[0]) == 1  # and it still generates


def test_engine_paints_with_previews(family, engine):
    events = list(engine.generate(ask(family, negative_prompt="" if family == "flux" else "blue")))
    assert isinstance(events[-1], Done), events[-1]
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.step for step in steps] == [1, 2, 3]
    assert steps[0].preview is not None
    assert steps[0].preview.width == 2 * steps[0].preview.height
    picture = next(event for event in events if isinstance(event, Picture))
    assert read_picture(picture.path) == picture.metadata
    assert (picture.metadata.height, picture.metadata.width) == (HEIGHT, WIDTH)
    if family in PICTURES:
        assert picture.image.size == (WIDTH, HEIGHT)
        assert picture.clip is picture.video is picture.metadata.frames is None
    else:
        assert picture.image.size == (4 * WIDTH, HEIGHT)
        assert len(picture.clip.frames) == picture.metadata.frames == FRAMES
        assert read_mp4(picture.video) == picture.metadata
    again = next(event for event in engine.generate(ask(family, negative_prompt=picture.metadata.negative_prompt))
                 if isinstance(event, Picture))  # fmt: skip
    assert again.image.tobytes() == picture.image.tobytes()


def test_stop_ends_within_one_step_and_decodes_nothing(family, engine, pipe, decodes, monkeypatch):
    stop, steps, at_stop = threading.Event(), [], None
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
    seen = []
    for event in engine.generate(ask(family, steps=200), stop):
        seen.append(event)
        if isinstance(event, Step) and at_stop is None:
            stop.set()
            at_stop = len(steps)  # counted where they are taken: on a busy machine events arrive late
    assert isinstance(seen[-1], Stopped)
    assert 0 < at_stop <= len(steps) <= at_stop + 1
    assert decodes == []
    assert isinstance(list(engine.generate(ask(family, steps=2)))[-1], Done)
    assert decodes


def test_command_line_paints(family, pipe, folder_of, tmp_path, capsys):
    is_clip = family in CLIPS
    words = ["generate", "a red apple", "--model", str(folder_of(family)), "-o", str(tmp_path / "out.png")]
    options = ["--steps", "2", "--size", f"{WIDTH}x{HEIGHT}", "--device", "cpu", "--dtype", "float32", "--json"]
    with pytest.raises(SystemExit) as left:
        cli.main([*words, *options, *(["--frames", str(FRAMES)] if is_clip else [])])
    assert left.value.code == 0
    row = json.loads(capsys.readouterr().out)["pictures"][0]
    names = ["out.png", "out.mp4"] if is_clip else ["out.png"]
    assert row["paths"] == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert read_picture(tmp_path / "out.png").model == family


def test_command_line_stops(family, pipe, folder_of, tmp_path, monkeypatch):
    if family not in ("flux", "wan"):
        pytest.skip("stopping is the same code for all; one of pictures and one of clips is enough")
    monkeypatch.setattr("pipelines.load_pipeline", lambda source, **options: pipe)
    before = set(threading.enumerate())  # among them those of other engines

    def interrupt(progress, task, description="", **fields):
        if description.startswith("step 2"):
            raise KeyboardInterrupt

    monkeypatch.setattr("apps.commands.generate.Progress.update", interrupt)
    size = ["--size", f"{WIDTH}x{HEIGHT}", *(["--frames", "9"] if family in CLIPS else [])]
    with pytest.raises(SystemExit) as left:
        cli.main(["generate", "x", "--model", str(folder_of(family)), "-o", str(tmp_path / "a.png"), *size,
                  "--steps", "30", "--device", "cpu"])  # fmt: skip
    assert left.value.code == 130
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "painter"]


def test_wishes_that_would_be_ignored_are_refused(family, engine):
    failed = None
    if family == "flux":  # its guidance is distilled: diffusers would drop the negative prompt without a word
        failed = list(engine.generate(ask(family, negative_prompt="blue")))[-1]
        reason = "negative prompt"
    elif family in PICTURES:
        failed = list(engine.generate(ask(family, frames=9)))[-1]
        reason = "not clips"
    else:
        pytest.skip("a clip takes all of it")
    assert isinstance(failed, Failed)
    assert failed.code == "bad_request"
    assert reason in failed.message


def test_guidance_of_two_calls_is_really_on(family, pipe, engine):
    """diffusers leaves it out, with a warning in the log, when there is no negative prompt."""
    if family != "qwen_image":
        pytest.skip("only with true_cfg_scale as the guidance")
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        list(engine.generate(ask(family, steps=1)))
        list(engine.generate(ask(family, steps=1, guidance=1)))
    handle.remove()
    assert len(calls) == 2 + 1
