"""Sound of clips: what a model makes is in the MP4, a given track takes its place, and the frames stay the same."""

from dataclasses import replace
from functools import wraps
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from apps.commands.generate import DeviceOptions, run
from apps.commands.given_options import make_options
from apps.commands.outputs import check_audio
from apps.service import engine as engine_module
from apps.service.engine import Engine
from apps.service.events import Picture
from apps.service.media import Clip, save_mp4
from apps.service.requests import TextToImageRequest
from apps.service.sound import FILE_RATE, SILENT, Sound, read_sound, sound_of
from apps.service.usage import UsageError
from tests.pipes.tiny_video import tiny_video_pipeline

FRAMES = tuple(Image.new("RGB", (32, 32), (20 * shade, 0, 0)) for shade in range(8))


def tone(seconds: float, rate: int = 24_000, pitch: float = 440.0, channels: int = 2) -> Sound:
    wave = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    return Sound(np.tile(wave.astype(np.float32), (channels, 1)), rate)


def pitch_of(sound: Sound) -> float:
    spectrum = np.abs(np.fft.rfft(sound.samples[0]))
    return float(spectrum.argmax() * sound.rate / sound.samples.shape[1])


def frames_of(path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in file.decode(video=0)]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("seconds", [0.4, 3.0])
def test_a_clip_carries_its_sound_as_long_as_it_plays(tmp_path, channels, seconds):
    heard = save_mp4(Clip(FRAMES, 8.0, tone(seconds, channels=channels)), tmp_path / "heard.mp4", None)
    mute = save_mp4(Clip(FRAMES, 8.0), tmp_path / "mute.mp4", None)
    assert frames_of(heard) == frames_of(mute)
    with av.open(str(heard)) as file:
        track = file.streams.audio[0]
        assert (track.codec_context.name, track.rate) == ("aac", 24_000)
        assert float(track.duration * track.time_base) == pytest.approx(1.0, abs=0.06)
    read = read_sound(heard, 1.0)
    assert pitch_of(read) == pytest.approx(440, abs=2)
    loud = np.abs(read.samples).max(axis=0)
    assert loud[: round(0.3 * FILE_RATE)].max() > 0.3
    if seconds < 1:
        assert loud[round(0.6 * FILE_RATE) :].max() < 0.01  # silence after its end


def test_files_without_sound_are_refused(tmp_path):
    mute = save_mp4(Clip(FRAMES, 8.0), tmp_path / "mute.mp4", None)
    with pytest.raises(ValueError, match="has no sound"):
        read_sound(mute, 1.0)
    (tmp_path / "note.txt").write_text("no sound")
    with pytest.raises(ValueError, match=r"no sound"):
        read_sound(tmp_path / "note.txt", 1.0)
    assert not read_sound(SILENT, 0.5).samples.any()
    with pytest.raises(UsageError, match="can't hold sound"):
        check_audio(SILENT, tmp_path / "clip.gif")


def test_the_sound_of_a_pipeline_is_read_with_the_rate_of_its_vocoder():
    pipe = SimpleNamespace(vocoder=SimpleNamespace(config={"output_sampling_rate": 16_000}))
    made = sound_of(pipe, SimpleNamespace(audio=torch.full((1, 2, 40), 3.0)))
    assert (made.rate, made.samples.shape, made.samples.max()) == (16_000, (2, 40), 1.0)
    assert sound_of(pipe, SimpleNamespace(frames=[])) is None
    with pytest.raises(ValueError, match="sampling rate"):
        sound_of(SimpleNamespace(), SimpleNamespace(audio=torch.zeros(1, 40)))


def test_the_command_line_replaces_the_sound(tmp_path, monkeypatch):
    monkeypatch.setattr(
        engine_module.Engine,
        "_load_pipeline",
        lambda self, source, device, load_options: tiny_video_pipeline(num_frames=8, num_inference_steps=1),
    )
    tone_file = save_mp4(Clip(FRAMES, 8.0, tone(1.0, pitch=660)), tmp_path / "tone.mp4", None)
    options, device = make_options(prompt="a fox", seed=1), DeviceOptions(device="cpu")
    run(options, tmp_path / "fox.mp4", device, audio=str(tone_file))
    assert pitch_of(read_sound(tmp_path / "fox.mp4", 0.9)) == pytest.approx(660, abs=2)
    run(options, tmp_path / "mute.mp4", device, audio=SILENT)
    assert np.abs(read_sound(tmp_path / "mute.mp4", 0.9).samples).max() < 1e-3
    assert frames_of(tmp_path / "mute.mp4") == frames_of(tmp_path / "fox.mp4")
    with pytest.raises(UsageError, match=r"none\.wav"):
        run(options, tmp_path / "fox.mp4", device, audio=str(tmp_path / "none.wav"))


def test_a_model_that_makes_sound_has_it_in_its_file(tmp_path):
    pipe = tiny_video_pipeline(num_frames=8, num_inference_steps=1)
    made = type(pipe).__call__

    class WithTone(type(pipe)):
        def info(self):
            return replace(super().info(), can_stream=False)

        @wraps(made)  # what a call may carry is read from its signature
        def __call__(self, *args, **kwargs):
            output = made(self, *args, **kwargs)
            output.audio = torch.from_numpy(tone(1.0, rate=16_000).samples)[None]
            return output

    pipe.__class__ = WithTone
    pipe.vocoder = SimpleNamespace(config={"output_sampling_rate": 16_000})
    engine = Engine({"tiny": "tiny"}, tmp_path, device="cpu", load=lambda source: pipe)
    told = list(engine.generate(TextToImageRequest(prompt="a fox", seed=1)))
    engine.close()
    picture = told[-2]
    assert isinstance(picture, Picture), told
    assert picture.clip.sound.rate == 16_000
    assert pitch_of(read_sound(picture.video, 0.9)) == pytest.approx(440, abs=2)
