"""A sheet of images with the prompt under each, for a README or a report."""

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT_INK, EDGE = "#f6f5f1", "#26262b", "#8a8a90", "#dcdad3"
GAP = 18
LINES = 2  # of text under an image
FONT_SIZE = 13
LINE_HEIGHT = 17
HEADER = 64


def contact_sheet(
    pictures: torch.Tensor, captions: Sequence[str], title: str, subtitle: str, columns: int = 8, tile: int = 144
) -> Image.Image:
    """Lays images out in rows.

    Args:
        pictures: `(B, 3, H, W)` in [-1, 1].
        captions: B texts; what doesn't fit into two lines is cut with an ellipsis.
        title: large, at the top left.
        subtitle: small, beside it at the right.
        columns: images in a row.
        tile: side of an image on the sheet, in pixels.

    Raises:
        ValueError: there are more or fewer captions than images, or none.
    """
    if len(pictures) != len(captions) or not captions:
        raise ValueError(f"{len(pictures)} images and {len(captions)} captions: give one caption for each image")
    rows = -(-len(captions) // columns)
    step = (tile + GAP, tile + GAP + LINES * LINE_HEIGHT + 6)
    sheet = Image.new("RGB", (GAP + columns * step[0], HEADER + rows * step[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, HEADER / 2), title, INK, ImageFont.load_default(24), anchor="lm")
    draw.text((sheet.width - GAP, HEADER / 2), subtitle, FAINT_INK, ImageFont.load_default(FONT_SIZE), anchor="rm")
    font = ImageFont.load_default(FONT_SIZE)
    levels = ((pictures.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)  # (B, 3, H, W)
    for i, (picture, caption) in enumerate(zip(levels, captions, strict=True)):
        left, top = GAP + i % columns * step[0], HEADER + i // columns * step[1]
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((tile, tile), Image.Resampling.LANCZOS)
        sheet.paste(image, (left, top))
        draw.rectangle((left - 1, top - 1, left + tile, top + tile), outline=EDGE)
        for number, line in enumerate(_wrap(caption, font, tile)):
            draw.text((left, top + tile + 5 + number * LINE_HEIGHT), line, INK, font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into at most `LINES` lines of `width` pixels, at spaces."""
    letters = max(1, int(width / font.getlength("abcdefghij") * 10) + 2)
    while letters > 1:
        lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder=" ...")
        if all(font.getlength(line) <= width for line in lines):
            return lines
        letters -= 1
    return [text[:1]]
