"""Every tiny pipeline, still and moving, as fine-tuning calls it: built alike, with its options and a small size."""

from typing import Any

from pipelines.info.guider_call import guided_call
from tests.families import tiny_video_families as moving
from tests.families.tiny import BUILDERS, CALLS, CHAT, tiny_pipeline

FEW_STEP = "sana_sprint"
"""A pipeline that can't be fine-tuned."""

FAMILIES = tuple(name for name in (*BUILDERS, *moving.BUILDERS) if name != FEW_STEP)

SIDES = {"ltx2": 64, "hunyuan_video15": 16}
"""Pixels, where 32 is too small or more than is needed."""

_BROUGHT = ("height", "width", "prompt", "negative_prompt", "num_frames", "video_length", "class_labels")
_SHORT = {"max_sequence_length": 16}


def build(name: str) -> Any:
    """Return the pipeline of a family, always the same."""
    pipe = tiny_pipeline(name) if name in BUILDERS else guided_call(moving.BUILDERS[name]())
    if name == "z_image":  # published templates give the empty prompt tokens too
        pipe.tokenizer.chat_template = "{{ 'user: ' }}" + CHAT
    return pipe


def side(name: str) -> int:
    """Return the side of a small image, pixels."""
    return SIDES.get(name, 32)


def options(name: str) -> dict[str, Any]:
    """Return the arguments of a family's call that are neither its prompt nor its size."""
    if name not in CALLS:
        return {} if name == "hunyuan_video15" else dict(_SHORT)
    return {key: value for key, value in CALLS[name].items() if key not in _BROUGHT}


def is_class(name: str) -> bool:
    """Return whether a pipeline takes classes instead of prompts."""
    return "class_labels" in CALLS.get(name, {})


def caption(name: str, number: int = 0) -> str:
    """Return a caption, or the number of a class."""
    return str(number + 1) if is_class(name) else ("a red cat", "two blue dogs on a green hill")[number]
