"""Video: text to clip, with a first and a last frame if there are any, later prompts, and clips to complete."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import gradio as gr

from apps.service.metadata import PictureSettings
from apps.studio import clip_length, controls, views
from apps.studio.page_values import PageError, Values
from apps.studio.strings import Strings
from apps.studio.tabs.base import Tab

ENDS = ("first_image", "last_image")
"""The images that a clip begins and ends with, as the page names them."""
SOURCES = (*ENDS, "video")
"""What a clip is made from: its ends, and a clip that is completed."""


def _build(words: Strings) -> dict[str, gr.components.Component]:
    parts: dict[str, Any] = {}
    with gr.Row(elem_id="ends"):
        for name in SOURCES:
            with gr.Column(elem_classes="end", min_width=120):
                parts[f"{name}_view"] = gr.HTML(views.end_image(name, words), js_on_load=None)
                with gr.Row(elem_classes="end-buttons"):
                    choose = words("video.choose" if name == "video" else "source.choose")
                    parts[f"{name}_file"] = gr.UploadButton(
                        choose, size="sm", elem_id=f"{name.replace('_', '-')}-file", min_width=80
                    )
                    parts[f"{name}_drop"] = gr.Button(words("end.drop"), size="sm", visible=False, min_width=60)
    parts |= clip_length.build(words)
    return parts | controls.lay_out("video", words, besides=parts)


def _task_of(values: Values, able: Collection[str]) -> str:
    if values["video"]:
        return "video_completion"
    if values["first_image"]:
        return "image_to_image"
    if able and "text_to_image" not in able:
        raise PageError("source.missing")
    return "text_to_image"


def _fields(values: Values) -> dict[str, object]:
    if values["video"]:
        if values["first_image"] or values["last_image"]:
            raise PageError("video.ends")
        return {"video": values["video"], "video_frames": values["video_frames"]}
    if values["video_mask"]:
        raise PageError("video.missing")
    return {"image": values["first_image"], "last_image": values["last_image"]}


def _show(settings: PictureSettings) -> dict[str, object]:
    return {
        "first_image": settings.image,
        "last_image": settings.last_image,
        "video": settings.video,
        "video_frames": settings.video_frames,
    }


TAB = Tab(
    "video",
    ("text_to_image", "image_to_image", "video_completion"),
    _build,
    _fields,
    _show,
    output="frames",
    task_of=_task_of,
    places=("video",),
)
