"""The tab of clips: there from the start with a model that makes some, and their length in seconds and frames."""

from __future__ import annotations

import pytest

from apps.service.engine import Engine
from apps.service.events import Failed, Picture
from apps.service.media import read_mp4
from apps.service.metadata import request_from_settings
from apps.service.requests import TextToImageRequest
from apps.studio import clip_length
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.model_choice import ModelChoice
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from pipelines.info.record import PipelineInfo

WORDS = Strings("en")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    names = {"stickers": "stickers", "other": "/nowhere", "stickers-video": "stickers-video"}
    engine = Engine(names, tmp_path_factory.mktemp("out"), device="cpu")
    sessions = Sessions(None)
    settings = SettingsHandlers(engine, WORDS, sessions, GenerationHandlers(engine, WORDS, sessions))
    yield ModelChoice(engine, WORDS, settings), engine, settings
    engine.close()


def test_the_tab_of_clips_chooses_a_model_and_going_back_the_one_before(world):
    choice, engine, _ = world
    changes = choice.enter("stickers", "video", None)
    assert (changes["model"], changes["replaced"], changes["fitted"]) == (
        "stickers-video",
        "stickers",
        "stickers-video",
    )
    assert changes["need"] == ""
    assert engine.loaded("stickers-video").result(60).frames == changes["frames"]["value"]
    back = choice.enter("stickers-video", "text", "stickers")
    assert back["model"] == "stickers"


def test_a_model_that_can_do_it_stays(world):
    choice, *_ = world
    assert "model" not in choice.enter("stickers", "inpaint", None)
    assert "model" not in choice.enter("stickers-video", "video", "stickers")
    assert "model" not in choice.enter("stickers", "gallery", None)
    assert "model" not in choice.enter("nobody", "video", None)


def test_who_may_not_load_models_is_offered_one_instead(world):
    choice, engine, _ = world
    engine.model("stickers").result(60)
    changes = choice.enter("stickers", "video", None, may_load=False)
    assert "model" not in changes
    assert changes["switch"]["value"] == "Use stickers-video"


def test_a_model_that_takes_long_to_read_is_not_loaded_by_a_click_on_a_tab(world, monkeypatch):
    choice, engine, _ = world
    engine.model("stickers").result(60)
    monkeypatch.setattr("apps.studio.model_choice.builtin_models", lambda: ())
    monkeypatch.setattr(engine, "loaded", lambda key: None)
    assert "model" not in choice.enter("stickers", "video", None)


def test_lengths_are_those_that_clips_can_have(world):
    _, engine, _ = world
    model = engine.model("stickers-video").result(60)
    shown = clip_length.shown(model, WORDS)
    assert shown["seconds"]["value"] == pytest.approx(model.frames / model.fps)
    assert "multiple" not in shown["frames_note"]
    info = PipelineInfo(
        tasks=("text_to_image",),
        arguments={},
        parameters=frozenset(),
        frames=81,
        frame_step=4,
        fps=16.0,
        output="frames",
    )
    assert [info.nearest_frames(seconds * info.fps) for seconds in (0.01, 1, 2.04, 5.06)] == [5, 17, 33, 81]
    assert "multiple of 4" in clip_length.shown(info, WORDS)["frames_note"]


def test_clips_play_at_the_rate_that_is_asked_for_and_models_are_told_it(world, monkeypatch):
    _, engine, _ = world
    model, told = engine.model("stickers-video").result(60), []
    stream = type(model.pipe).stream
    monkeypatch.setattr(type(model.pipe), "stream", lambda pipe, **call: told.append(call) or stream(pipe, **call))
    asked = {"prompt": "a dog", "model": "stickers-video", "frames": 4, "steps": 1, "width": 32, "height": 32}
    for fps, call in ((None, None), (model.fps, None), (20.0, 20.0)):
        request = TextToImageRequest.model_validate({**asked, "fps": fps})
        picture = next(event for event in engine.generate(request) if isinstance(event, Picture))
        assert told[-1].get("frame_rate") == call
        settings = read_mp4(picture.video)
        assert settings.fps == (fps or model.fps)
        assert picture.clip.fps == settings.fps
        assert request_from_settings(settings).fps == settings.fps
    *_, last = engine.generate(TextToImageRequest(prompt="a dog", model="stickers", fps=8.0))
    assert isinstance(last, Failed)
    assert "leave out fps" in last.message
