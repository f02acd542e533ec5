"""A folder of images with captions to learn the style from, in the form that trainers of LoRAs read.

Each image `NAME.png` has its captions in `NAME.txt`, one a line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from apps.stickers.captions import caption
from apps.stickers.fluent.sheet import load_fluent, single_scene
from apps.stickers.fluent.split import TRAINING, TRIGGER, plain_caption, with_trigger
from apps.stickers.renderer import render
from apps.stickers.scene import BASIC_COLOURS, SIZES, Scene, check_drawn, generator
from apps.stickers.sprites import SpriteSheet

SERIES = 2**43  # of the places and captions: no training, validation or evaluation of the world draws from it
SPREAD = 0.04  # of a sticker's centre around the middle, as in the world's scenes of one sticker
RESOLUTION = 128


@dataclass(frozen=True)
class Example:
    """One image to learn from: what it shows, and captions for it."""

    name: str
    scene: Scene
    captions: tuple[str, ...]


def draw_examples(
    names: Sequence[str] = TRAINING,
    *,
    sheet: SpriteSheet | None = None,
    trigger: str = TRIGGER,
    colours: Sequence[str] = BASIC_COLOURS,
    phrasings: int = 1,
    seed: int = 0,
) -> list[Example]:
    """Draw one example for each name; the same ones for the same arguments.

    Colours are taken in turn, so that each occurs about equally often; places and sizes vary as in the world.

    Args:
        names: of the stickers.
        sheet: the stickers; None takes the Fluent 3D ones.
        trigger: words behind each caption that ask for the style; empty adds none.
        colours: of the backgrounds.
        phrasings: captions of an image; the first is `plain_caption`, the others are in the world's various phrasings.
        seed: of places, sizes and phrasings.

    Raises:
        KeyError: a name isn't in the sheet.
        ValueError: a colour is unknown, or `phrasings` isn't positive.
    """
    check_drawn(names, "all", colours)
    if phrasings < 1:
        raise ValueError(f"phrasings is {phrasings}: give 1 or more")
    sheet = sheet or load_fluent()
    examples = []
    for number, name in enumerate(names):
        rng = generator(SERIES + seed, number)
        across, down, larger = (float(u) for u in rng.random(3))
        x, y = (0.5 + SPREAD * (2 * u - 1) for u in (across, down))
        low, high = SIZES[None]
        colour = colours[number % len(colours)]
        scene = single_scene(name, colour, sheet, x=x, y=y, size=low + (high - low) * larger)
        others = (with_trigger(caption(scene, sheet, rng, synonyms=0), trigger) for _ in range(phrasings - 1))
        examples.append(Example(name, scene, (plain_caption(name, colour, trigger), *others)))
    return examples


def write_training_folder(
    folder: Path,
    *,
    names: Sequence[str] = TRAINING,
    trigger: str = TRIGGER,
    colours: Sequence[str] = BASIC_COLOURS,
    phrasings: int = 1,
    seed: int = 0,
) -> list[Path]:
    """Write training images, 128 x 128 pixels, with their captions.

    Args:
        folder: is made if it is missing; files of other names stay.
        names: of the stickers, one image each.
        trigger: words behind each caption that ask for the style; empty for a trainer that adds them itself.
        colours: of the backgrounds.
        phrasings: captions (lines) of an image.
        seed: of places, sizes and phrasings.

    Returns:
        The image files.

    Raises:
        KeyError: there is no such sticker in this style.
        ValueError: a colour is unknown, or `phrasings` isn't positive.
    """
    sheet = load_fluent()
    examples = draw_examples(names, sheet=sheet, trigger=trigger, colours=colours, phrasings=phrasings, seed=seed)
    images = render([example.scene for example in examples], sheet, RESOLUTION)  # (N, 3, 128, 128)
    levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)  # (N, 3, 128, 128)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for example, image in zip(examples, levels, strict=True):
        file = folder / f"{example.name.replace(' ', '_')}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        file.with_suffix(".txt").write_text("\n".join(example.captions) + "\n", encoding="ascii")
        files.append(file)
    return files
