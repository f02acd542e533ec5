"""Length and frame rate of the clips that diffusers' families were made for.

Most of their calls have a number of frames by default, few have a frame rate: that stands only in the examples of
diffusers and in the code that was published with the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.info.record import FALLBACK_FPS, FALLBACK_FRAMES


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipDefaults:
    """What a family doesn't say itself.

    Attributes:
        name: how the names of its pipelines' classes begin.
        setting: entry of the pipeline's or the network's configuration that only these models have set; empty for all
            models of the family.
        fps: frames a second.
        frames: number of frames; None where the call or the network's configuration says it.
    """

    name: str
    setting: str = ""
    fps: float
    frames: int | None = None


CLIP_DEFAULTS = (
    ClipDefaults(name="CogVideoX", fps=8),
    ClipDefaults(name="CogVideoX", setting="patch_size_t", fps=16),  # CogVideoX 1.5
    # diffusers' examples play shortened clips at 15; 129 and 121 frames at 24 are the five seconds that both versions
    # were trained for, and what their own scripts write.
    ClipDefaults(name="HunyuanVideo", fps=24),
    ClipDefaults(name="HunyuanSkyreels", fps=24),
    ClipDefaults(name="HunyuanVideoFramepack", fps=30),
    ClipDefaults(name="Kandinsky5", fps=24),
    ClipDefaults(name="LTX", fps=25),
    ClipDefaults(name="LTX2", fps=24, frames=121),  # its call has None, which becomes 121 inside
    ClipDefaults(name="Mochi", fps=30),
    ClipDefaults(name="Wan", fps=16),
    ClipDefaults(name="Wan", setting="expand_timesteps", fps=24),  # Wan 2.2 TI2V-5B
    ClipDefaults(name="WanAnimate", fps=30),
)
"""By class and configuration; the row with the longest name counts, and of equal ones that with a setting."""


def clip_defaults_of(pipeline: type, *configs: Any) -> ClipDefaults | None:
    """Return the row of a pipeline.

    Args:
        pipeline: its class; a class that is derived from a listed one counts as that.
        *configs: the configurations of the pipeline and its network, with attributes; None for one that it lacks.

    Returns:
        The row; None for a family that has none.
    """
    for ancestor in pipeline.__mro__:
        found = [
            row
            for row in CLIP_DEFAULTS
            if ancestor.__name__.startswith(row.name)
            and (not row.setting or any(getattr(one, row.setting, None) for one in configs))
        ]
        if found:
            return max(found, key=lambda row: (len(row.name), bool(row.setting)))
    return None


def default_frames(said: object, config: Any, row: ClipDefaults | None) -> int:
    """Return how many frames a pipeline was made for.

    Args:
        said: the default of its call, which goes first.
        config: of its network, which comes second; None without one.
        row: of the pipeline.
    """
    known = (said, getattr(config, "sample_frames", None), row and row.frames)
    return next((frames for frames in known if isinstance(frames, int)), FALLBACK_FRAMES)


def default_fps(defaults: Mapping[str, Any], row: ClipDefaults | None) -> float:
    """Return how many frames a second the clips of a pipeline have.

    Args:
        defaults: of its call, whose frame rate goes first.
        row: of the pipeline.
    """
    known = (defaults.get("frame_rate"), defaults.get("fps"), row and row.fps)
    return float(next((rate for rate in known if isinstance(rate, int | float)), FALLBACK_FPS))
