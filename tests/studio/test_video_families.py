"""Families of clips that only diffusers has, from the studio's engine and from a folder, with the sound of LTX-2."""

import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from apps import cli
from apps.service.engine import Engine
from apps.service.events import Picture, Step
from apps.service.media import read_mp4
from apps.service.metadata import request_from_settings
from apps.service.model_pool import abilities_on_disk
from apps.service.requests import TextToImageRequest
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.sessions import Sessions
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from pipelines import load_pipeline, previews
from tests.families.tiny_video_families import BUILDERS, SOUND_RATE

SIZES = {"wan22": (64, 32), "hunyuan_video15": (64, 32), "ltx2": (128, 64), "kandinsky5": (64, 32)}
RATES = {"wan22": 16, "hunyuan_video15": 24, "ltx2": 24, "kandinsky5": 24}
FRAMES = 9


def make_request(name, **changes):
    width, height = SIZES[name]
    asked = {"prompt": "a red apple", "width": width, "height": height, "frames": FRAMES, "steps": 2, "seed": 1}
    return TextToImageRequest(**{**asked, **changes})


def picture_of(told):
    problems = [event for event in told if not isinstance(event, Step | Picture) and hasattr(event, "message")]
    assert not problems, problems[0].message
    return next(event for event in told if isinstance(event, Picture))


def pixels(clip):
    return [frame.tobytes() for frame in clip.frames]


@pytest.fixture(scope="module", params=BUILDERS)
def world(request, tmp_path_factory):
    """One family behind the engine, and a clip that it has made."""
    name, pipe = request.param, BUILDERS[request.param]()
    engine = Engine({"tiny": "tiny"}, tmp_path_factory.mktemp(name), device="cpu", load=lambda source: pipe)
    told = list(engine.generate(make_request(name)))
    yield SimpleNamespace(name=name, pipe=pipe, engine=engine, told=told)
    engine.close()


def test_a_clip_is_made_and_made_again_from_its_file(world):
    picture = picture_of(world.told)
    steps = [event for event in world.told if isinstance(event, Step)]
    assert [step.step for step in steps] == [1, 2]
    assert len(picture.clip.frames) == FRAMES
    assert {frame.size for frame in picture.clip.frames} == {SIZES[world.name]}
    with av.open(str(picture.video)) as file:
        assert file.streams.video[0].average_rate == RATES[world.name]
        assert len(list(file.decode(video=0))) == FRAMES
    settings = read_mp4(picture.video)
    assert settings.fps == RATES[world.name]
    assert (settings.frames, settings.steps, settings.seed) == (FRAMES, 2, 1)
    again = picture_of(list(world.engine.generate(request_from_settings(settings))))
    assert pixels(again.clip) == pixels(picture.clip)
    assert np.std([np.asarray(frame) for frame in picture.clip.frames]) > 1
    other = picture_of(list(world.engine.generate(make_request(world.name, prompt="nine blue horses"))))
    assert pixels(other.clip) != pixels(picture.clip)


def test_the_tab_of_clips_is_where_it_is_at_home(world):
    model = world.engine.model().result(60)
    assert model.output == "frames"
    assert "text_to_image" in model.tasks
    assert all(side % model.multiple == 0 for side in SIZES[world.name])
    assert world.name != "ltx2" or model.multiple == 32  # what its call checks
    assert model.frame_step == {"ltx2": 8, "hunyuan_video15": 2}.get(world.name, 4)
    assert model.nearest_frames(FRAMES + 1) == FRAMES
    sessions, words = Sessions(None), Strings("en")
    handlers = SettingsHandlers(world.engine, words, sessions, GenerationHandlers(world.engine, words, sessions))
    assert handlers.load_model_controls("tiny", "text")["mode"] == "video"


def test_a_folder_says_what_it_can_and_makes_the_same_clip(world, tmp_path):
    world.pipe.save_pretrained(tmp_path / "model")
    found = abilities_on_disk(str(tmp_path / "model"))
    assert found.output == "frames"
    assert "text_to_image" in found.tasks
    loaded = load_pipeline(tmp_path / "model", device="cpu")
    assert isinstance(loaded, type(world.pipe))
    engine = Engine({"tiny": "tiny"}, tmp_path / "out", device="cpu", load=lambda source: loaded)
    picture = picture_of(list(engine.generate(make_request(world.name))))
    assert engine.model().result(60).fingerprint == world.engine.model().result(60).fingerprint
    engine.close()
    first, loaded_first = (np.stack(clip.frames).astype(int) for clip in (picture_of(world.told).clip, picture.clip))
    assert np.abs(first - loaded_first).max() <= 2  # memory laid out in another way rounds otherwise


def test_the_command_line_drives_a_folder(world, tmp_path, capsys):
    world.pipe.save_pretrained(tmp_path / "model")
    width, height = SIZES[world.name]
    words = ["generate", "a red apple", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out.mp4")]
    options = ["--steps", "2", "--seed", "1", "--size", f"{width}x{height}", "--frames", str(FRAMES), "--device", "cpu"]
    with pytest.raises(SystemExit) as left:
        cli.main([*words, *options, "--json"])
    assert left.value.code == 0
    assert str(tmp_path / "out.mp4") in json.loads(capsys.readouterr().out)["pictures"][0]["paths"]
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert len(file.streams.audio) == (world.name == "ltx2")
        assert len(list(file.decode(video=0))) == FRAMES


def test_only_ltx2_is_heard(world):
    picture = picture_of(world.told)
    with av.open(str(picture.video)) as file:
        tracks = file.streams.audio
        if world.name != "ltx2":
            assert picture.clip.sound is None
            assert not tracks
            return
        assert len(tracks) == 1
        assert tracks[0].rate == SOUND_RATE
        assert float(tracks[0].duration * tracks[0].time_base) == pytest.approx(picture.clip.seconds, abs=0.06)
    sound = picture.clip.sound
    assert (sound.rate, len(sound.samples)) == (SOUND_RATE, 2)
    assert sound.samples.shape[1] / sound.rate == pytest.approx(picture.clip.seconds, abs=0.06)
    assert sound.samples.std() > 0


def test_previews_have_the_shape_of_the_clip(world):
    """The first step always shows one, but for HunyuanVideo-1.5, which shows its latents to nobody."""
    preview = next(event for event in world.told if isinstance(event, Step)).preview
    if world.name == "hunyuan_video15":
        assert preview is None
        return
    width, height = SIZES[world.name]
    assert preview.width * height == preview.height * width


def test_a_clip_that_is_ended_early_is_led_to_its_end(world, monkeypatch):
    """Kandinsky 5 changes its latents in place: what they were before a step has to be kept."""
    if not world.engine.model().result(60).can_finish:
        pytest.skip("it can't be ended early")
    led = []
    plain = previews.predict_x0

    def predict_x0(pipe, before, latents):
        led.append(not torch.equal(before, latents))
        return plain(pipe, before, latents)

    monkeypatch.setattr(previews, "predict_x0", predict_x0)
    picture = picture_of(list(world.engine.generate(make_request(world.name, steps=4, finish_after=2))))
    assert picture.metadata.finish_after == 2
    assert led
    assert all(led)


def test_both_experts_of_wan22_take_part():
    pipe, calls = BUILDERS["wan22"](), []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    pipe("a red apple", height=16, width=32, num_frames=5, num_inference_steps=2, guidance_scale=1.0)
    assert calls == ["transformer", "transformer_2"]


def test_kandinsky5_loads_with_a_processor_around_its_tokenizer(tmp_path):
    """Published models store one, whose part for clips needs torchvision; the pipeline gives it texts only."""
    pipe = BUILDERS["kandinsky5"]()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "Qwen2VLProcessor"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    images = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "tokenizer" / "preprocessor_config.json").write_text(json.dumps(images))
    loaded = load_pipeline(tmp_path, device="cpu")
    texts = ["a red apple", "nine blue horses"]
    assert loaded.tokenizer(text=texts)["input_ids"] == pipe.tokenizer(text=texts)["input_ids"]
    clips = [
        one("a red apple", height=32, width=32, num_frames=5, num_inference_steps=1, guidance_scale=1.0).frames[0]
        for one in (pipe, loaded)
    ]
    assert [len(clip) for clip in clips] == [5, 5]
