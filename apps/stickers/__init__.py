"""The sticker world: known images with known captions, so that a model can be trained and judged exactly.

`SceneSampler` draws what an image holds, `caption` says it, `render` draws it. Nothing outside `apps` imports this.
"""

from apps.stickers.captions import caption, unique_keywords
from apps.stickers.renderer import render
from apps.stickers.scene import BACKGROUNDS, BASIC_COLOURS, COLOURS, Placement, Scene, SceneMix, SceneSampler, generator
from apps.stickers.sprites import SpriteSheet, load_sprites
from apps.stickers.vocabulary import COMMON, STARTER

__all__ = [
    "BACKGROUNDS",
    "BASIC_COLOURS",
    "COLOURS",
    "COMMON",
    "STARTER",
    "Placement",
    "Scene",
    "SceneMix",
    "SceneSampler",
    "SpriteSheet",
    "caption",
    "generator",
    "load_sprites",
    "render",
    "unique_keywords",
]
