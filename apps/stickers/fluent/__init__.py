"""Stickers in a second style: the starter names as Microsoft's Fluent 3D emoji, for examples of learning a style.

`load_fluent` gives them as a sheet like that of the flat stickers, so samplers, renderer and judges take either.
`TRAINING` and `UNSEEN` are a fixed split of the names; `python -m apps.stickers.fluent FOLDER` writes the former as
images with captions.
"""

from apps.stickers.fluent.sheet import FluentSheet, in_style, load_fluent, single_scene
from apps.stickers.fluent.split import TRAINING, TRIGGER, UNSEEN, plain_caption, with_trigger
from apps.stickers.fluent.training_folder import draw_examples, write_training_folder

__all__ = [
    "TRAINING",
    "TRIGGER",
    "UNSEEN",
    "FluentSheet",
    "draw_examples",
    "in_style",
    "load_fluent",
    "plain_caption",
    "single_scene",
    "with_trigger",
    "write_training_folder",
]
