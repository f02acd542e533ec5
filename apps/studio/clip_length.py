"""Length of a clip on the page: seconds beside frames, as many as clips of the model can have."""

from __future__ import annotations

from typing import Any

import gradio as gr

from apps.service import limits
from apps.service.engine import Engine
from apps.service.model_pool import LoadedModel
from apps.studio import controls, fields, views
from apps.studio.controls import Parts
from apps.studio.strings import Strings

FPS = 16.0
"""Frames a second until a model is loaded."""


def build(words: Strings) -> Parts:
    """Lay out the length: seconds, frames, and which numbers of them there are."""
    with gr.Row(elem_id="clip-length"):
        seconds = fields.Slider(
            0.1, limits.MAX_FRAMES / FPS, 1.0, step=0.1, label=words("seconds"), elem_id="seconds", min_width=160
        )
        frames = controls.build("frames", words, min_width=80)
        fps = controls.build("fps", words, min_width=80)
    note = gr.HTML("", elem_id="frames-note", js_on_load=None)
    return {"seconds": seconds, "frames": frames, "fps": fps, "frames_note": note}


def shown(model: LoadedModel, words: Strings) -> dict[str, Any]:
    """Return the controls as they are for a model: its usual length, and what others there are."""
    if model.frames is None:
        return {"frames": gr.update(value=None), "fps": gr.update(value=None), "frames_note": ""}
    step = model.frame_step
    note = "" if step == 1 else words("frames.steps", step=step)
    most = round(limits.MAX_FRAMES / model.fps, 1)
    return {
        "frames": gr.update(value=model.frames),
        "fps": gr.update(value=model.fps),
        "seconds": gr.update(value=round(model.frames / model.fps, 2), maximum=most),
        "frames_note": views.hint(note),
    }


def connect(parts: Parts, engine: Engine, **quiet: Any) -> None:
    """Have seconds and frames follow each other.

    Args:
        parts: of the page.
        engine: knows the chosen model.
        **quiet: arguments of all listeners.
    """

    def frames_of(seconds: Any, fps: Any, key: str) -> Any:
        model, rate = _clips(engine, key), _rate(fps)
        if model is None or rate is None or not isinstance(seconds, int | float):
            return gr.skip()
        return min(model.nearest_frames(seconds * rate), limits.MAX_FRAMES)

    def seconds_of(frames: Any, fps: Any) -> Any:
        rate = _rate(fps)
        return gr.skip() if rate is None or not isinstance(frames, int | float) else round(frames / rate, 2)

    length = [parts["frames"], parts["fps"]]
    asked = [parts["seconds"], parts["fps"], parts["model"]]
    parts["seconds"].input(frames_of, asked, parts["frames"], **quiet)
    gr.on([one.change for one in length], seconds_of, length, parts["seconds"], **quiet)


def _rate(fps: object) -> float | None:
    """Return a number of frames a second that can be divided by; None for anything else."""
    return float(fps) if isinstance(fps, int | float) and fps > 0 else None


def _clips(engine: Engine, key: object) -> LoadedModel | None:
    """Return a model that is loaded and makes clips."""
    loading = engine.loaded(key) if isinstance(key, str) and key in engine.models else None
    if loading is None or not loading.done() or loading.exception() is not None:
        return None
    model = loading.result()
    return None if model.frames is None else model
