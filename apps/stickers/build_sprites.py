"""Rebuilds the sprite sheet from the colour emoji font and the Unicode names (`python -m apps.stickers.build_sprites`).

Nobody needs this to train or to evaluate: its products, `data/sprites.webp` and `data/names.json`, are shipped.
It needs Debian's packages fonts-noto-color-emoji (images) and unicode-cldr-core (names), and Pillow with raqm.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apps.stickers.sprites import COLUMNS, DATA, SIDE

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common/annotations/en.xml")
FONT_SIZE = 109  # the only size of the font's bitmaps
GLYPH_WIDTH = 136  # width of one bitmap; anything wider is a sequence that the font draws as several images
ALIKE = 0.048  # root mean square difference (0 to 1, at 32x32) under which two images count as the same
LEFT_OUT = ("button", "skin tone")  # lettered squares and colour swatches, which nobody would name in a prompt
# Shapes that differ from their large namesakes only in size, which fitting takes away.
RESIZED = ("medium square", "medium-small square", "small square", "small orange diamond", "small blue diamond")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotation:
    """What CLDR says about one emoji: its characters, its short name, its keywords."""

    characters: str
    name: str
    keywords: tuple[str, ...]


def read_annotations(path: Path = ANNOTATIONS) -> list[Annotation]:
    """Read the characters that have a text-to-speech name, in the file's order."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for element in ElementTree.parse(path).getroot().iter("annotation"):
        characters, text = element.attrib["cp"], (element.text or "").lower()
        if element.get("type") == "tts":
            names[characters] = " ".join(text.replace("\u2019", "'").split())
        else:
            keywords[characters] = tuple(word.strip().replace("\u2019", "'") for word in text.split("|"))
    return [Annotation(c, name, keywords.get(c, ())) for c, name in names.items()]


def draw_glyph(characters: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Draws one emoji, cropped to its visible box.

    Returns:
        A straight-alpha RGBA image, or None where the font has no single coloured image for it.
    """
    canvas = Image.new("RGBA", (4 * GLYPH_WIDTH, 2 * GLYPH_WIDTH), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((GLYPH_WIDTH, 40), characters, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None or box[2] - box[0] > GLYPH_WIDTH or min(box[2] - box[0], box[3] - box[1]) < 12:
        return None
    return canvas.crop(box)


def fit(picture: Image.Image, side: int = SIDE) -> np.ndarray:
    """Scales an image so that its longer side is `side`, and centres it on a transparent square.

    The scaling is done on premultiplied colours, so no edge picks up the colour of transparent pixels; these end
    up with the mean colour of the image, which compresses well and does no harm when a lossy codec smears it.

    Returns:
        `(side, side, 4)` uint8, straight alpha.
    """
    width, height = picture.size
    scale = side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    straight = np.asarray(picture, dtype=np.float32)
    alpha = straight[..., 3:] / 255
    planes = [*np.moveaxis(straight[..., :3] * alpha, -1, 0), alpha[..., 0] * 255]
    resized = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.LANCZOS)) for p in planes], -1)
    resized = resized.clip(0, 255)
    opacity = resized[..., 3:] / 255
    mean = resized[..., :3].sum((0, 1)) / max(float(opacity.sum()), 1.0)
    colour = np.where(opacity > 1 / 255, resized[..., :3] / np.maximum(opacity, 1 / 255), mean)
    square = np.concatenate([np.broadcast_to(mean, (side, side, 3)), np.zeros((side, side, 1))], axis=-1)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0], :3] = colour
    square[top : top + size[1], left : left + size[0], 3] = resized[..., 3]
    return square.clip(0, 255).round().astype(np.uint8)


def thumbnail(sprite: np.ndarray, side: int = 32) -> np.ndarray:
    """Return a sprite's premultiplied RGBA mean over `side` x `side` cells, flat, in [0, 1]."""
    values = sprite.astype(np.float32) / 255
    values[..., :3] *= values[..., 3:]
    step = SIDE // side
    return values.reshape(side, step, side, step, 4).mean((1, 3)).ravel()  # (side * side * 4,)


def collect(font_path: Path = FONT, annotations: Path = ANNOTATIONS) -> tuple[list[Annotation], list[np.ndarray]]:
    """Draws every usable emoji once: none empty or left out, and one of each name and each image.

    Images are compared after they are fitted, where for instance the small and the large black square are equal.
    """
    font = ImageFont.truetype(str(font_path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    missing = draw_glyph("\U0010fffd", font)
    seen = set() if missing is None else {hashlib.sha256(missing.tobytes()).hexdigest()}
    kept: list[Annotation] = []
    pictures: list[np.ndarray] = []
    thumbnails: list[np.ndarray] = []
    names: set[str] = set()
    for annotation in read_annotations(annotations):
        if annotation.name in names or any(word in annotation.name for word in LEFT_OUT + RESIZED):
            continue
        if max(map(ord, annotation.characters)) < 0x2000 and annotation.characters not in "\u00a9\u00ae":
            continue  # digits and punctuation: parts of key caps, no images of their own
        glyph = draw_glyph(annotation.characters, font)
        if glyph is None:
            continue
        digest = hashlib.sha256(glyph.tobytes()).hexdigest()
        if digest in seen:
            continue
        sprite = fit(glyph)
        small = thumbnail(sprite)
        if any(np.sqrt(np.square(small - other).mean()) < ALIKE for other in thumbnails):
            continue
        seen.add(digest)
        thumbnails.append(small)
        names.add(annotation.name)
        kept.append(annotation)
        pictures.append(sprite)
    return kept, pictures


def write(annotations: list[Annotation], pictures: list[np.ndarray], folder: Path = DATA, quality: int = 80) -> None:
    """Write the sheet (`COLUMNS` sprites a row, WebP with alpha) and the table of names."""
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.zeros((rows * SIDE, COLUMNS * SIDE, 4), np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // COLUMNS * SIDE, i % COLUMNS * SIDE
        sheet[top : top + SIDE, left : left + SIDE] = picture
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(sheet)
    image.save(folder / "sprites.webp", quality=quality, alpha_quality=90, method=6, exact=True)
    table = [{"name": a.name, "characters": a.characters, "keywords": a.keywords} for a in annotations]
    lines = ",\n".join(json.dumps(row) for row in table)
    (folder / "names.json").write_text(f"[\n{lines}\n]\n", encoding="ascii")


def main() -> None:
    """Rebuilds both files in place."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    annotations, pictures = collect()
    write(annotations, pictures)
    logger.info("%d sprites, %.2f MiB", len(pictures), (DATA / "sprites.webp").stat().st_size / 2**20)


if __name__ == "__main__":
    main()
