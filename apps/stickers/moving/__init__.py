"""The moving sticker world: known clips with known captions, so that a video model can be trained and judged exactly.

`ClipSceneSampler` draws what a clip holds, `clip_caption` says it, `render_clip` draws it, and `ClipJudge` reads it.
"""

from apps.stickers.moving.captions import clip_caption
from apps.stickers.moving.ceiling import clip_ceiling
from apps.stickers.moving.clips import ClipSheet, load_clips
from apps.stickers.moving.judge import ClipJudge, ClipReading, score_clip
from apps.stickers.moving.playback import OWN_MOTIONS, source_frames
from apps.stickers.moving.renderer import render_clip
from apps.stickers.moving.scene import SCENE_MOTIONS, ClipMix, ClipScene, ClipSceneSampler, MovingSticker, Pose

__all__ = [
    "OWN_MOTIONS",
    "SCENE_MOTIONS",
    "ClipJudge",
    "ClipMix",
    "ClipReading",
    "ClipScene",
    "ClipSceneSampler",
    "ClipSheet",
    "MovingSticker",
    "Pose",
    "clip_caption",
    "clip_ceiling",
    "load_clips",
    "render_clip",
    "score_clip",
    "source_frames",
]
