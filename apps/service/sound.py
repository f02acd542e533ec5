"""The sound of clips: what a model makes beside its frames, what a file holds, or silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SILENT = "silent"
"""Name of a track without sound, which some players and platforms want."""
FILE_RATE = 48_000
"""Samples a second that files are read with, and of silence."""
RATE_NAMES = ("output_sampling_rate", "sampling_rate", "sample_rate")
"""Names under which the parts of a pipeline say how many samples a second they make."""


@dataclass(frozen=True, slots=True)
class Sound:
    """A waveform.

    Attributes:
        samples: float32 in [-1, 1], (channels, N); one channel or two.
        rate: samples a second.
    """

    samples: np.ndarray
    rate: int

    def lasting(self, seconds: float) -> Sound:
        """Return it with this length: cut, or followed by silence."""
        count = round(seconds * self.rate)
        missing = max(count - self.samples.shape[1], 0)
        return Sound(np.pad(self.samples[:, :count], ((0, 0), (0, missing))), self.rate)


def sound_of(pipe: Any, output: Any) -> Sound | None:
    """Return what a pipeline has made beside the frames of its first clip, such as LTX-2; None for most.

    Args:
        pipe: a pipeline.
        output: of its call.

    Raises:
        ValueError: it made sound, but no part of it says at which rate.
    """
    audio = getattr(output, "audio", None)
    if audio is None:
        return None
    rate = _rate(pipe)
    if rate is None:
        raise ValueError(
            f"{type(pipe).__name__} makes sound, but neither its vocoder nor its audio_vae says its sampling rate; set "
            "`output_sampling_rate` in the config of its vocoder."
        )
    first: Any = audio[0]
    wave = first.detach().float().cpu().numpy() if hasattr(first, "detach") else np.asarray(first, np.float32)
    return Sound(np.clip(np.atleast_2d(wave)[:2], -1, 1).astype(np.float32), rate)


def _rate(pipe: Any) -> int | None:
    for part in ("vocoder", "audio_vae"):
        config = getattr(getattr(pipe, part, None), "config", None)
        if isinstance(config, Mapping):
            found = next((config[name] for name in RATE_NAMES if config.get(name)), None)
            if found is not None:
                return int(found)
    return None


def read_sound(name: str | Path, seconds: float) -> Sound:
    """Read the sound of a file, or `SILENT`, for a clip.

    Args:
        name: an audio file or a video with sound, of any form that FFmpeg reads; or `SILENT`.
        seconds: how much of it, from its beginning.

    Raises:
        ValueError: the file holds no sound, or can't be read.
    """
    if str(name) == SILENT:
        return Sound(np.zeros((2, round(seconds * FILE_RATE)), np.float32), FILE_RATE)
    import av

    try:
        with av.open(str(name)) as file:
            if not file.streams.audio:
                raise ValueError(f"{str(name)!r} has no sound; give an audio file, a video with sound, or {SILENT!r}.")
            resampler = av.AudioResampler(format="fltp", layout="stereo", rate=FILE_RATE)
            parts, count, most = [], 0, round(seconds * FILE_RATE)
            for frame in file.decode(audio=0):
                for part in resampler.resample(frame):
                    parts.append(part.to_ndarray())  # (2, n)
                    count += parts[-1].shape[1]
                if count >= most:
                    break
    except (OSError, av.FFmpegError) as error:
        raise ValueError(f"{str(name)!r} holds no sound that can be read: {error}.") from error
    samples = np.concatenate(parts, axis=1) if parts else np.zeros((2, 0), np.float32)
    return Sound(samples.astype(np.float32), FILE_RATE).lasting(seconds)


def add_track(file: Any, sound: Sound) -> Any:
    """Add an AAC track for a sound to an MP4 file, before anything is written into it; returns the track.

    Args:
        file: `av` container that is opened for writing.
        sound: what will be heard.
    """
    return file.add_stream("aac", rate=sound.rate, layout=_layout(sound))


def fill_track(file: Any, track: Any, sound: Sound, seconds: float) -> None:
    """Encode a sound, as long as its clip, into the track that `add_track` made."""
    import av

    samples = np.ascontiguousarray(sound.lasting(seconds).samples)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=_layout(sound))
    frame.sample_rate = sound.rate
    file.mux(track.encode(frame))
    file.mux(track.encode())


def _layout(sound: Sound) -> str:
    return "stereo" if len(sound.samples) == 2 else "mono"
