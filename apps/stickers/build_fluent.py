"""Rebuilds the sheet of Fluent 3D stickers from an archive of npm (`python -m apps.stickers.build_fluent FOLDER`).

Nobody needs this to train or to evaluate: its products, `data/fluent_3d.webp` and `data/fluent_3d.json`, are shipped.
It downloads one archive (16 MB) into FOLDER, unless it is there already.
"""

import argparse
import io
import json
import logging
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from apps.stickers.build_sprites import fit
from apps.stickers.emoji_archives import VISIBLE, clean_edges, code, download
from apps.stickers.fluent.sheet import COLUMNS, SHEET_FILE, TABLE_FILE
from apps.stickers.sprites import DATA, SIDE
from apps.stickers.vocabulary import STARTER

URL = "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz"
SHA256 = "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
QUALITY = 90  # of the colours, of 100: a style is in its fine shades, and the sheet is small
ALPHA_QUALITY = 95

logger = logging.getLogger(__name__)


def read_sprite(data: bytes) -> np.ndarray:
    """Read a WebP image, cropped to its visible box.

    Returns:
        `(128, 128, 4)` uint8, straight alpha; the longer side of the box is 128 px.
    """
    with Image.open(io.BytesIO(data)) as file:
        picture = file.convert("RGBA")
    visible = Image.fromarray(np.asarray(picture)[..., 3] > VISIBLE)
    return clean_edges(fit(picture.crop(visible.getbbox())))


def collect(archive: Path, characters: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Read the images of the given names.

    Args:
        archive: of npm, gzipped.
        characters: for each name its emoji.

    Returns:
        For each name, in the same order, `(128, 128, 4)` uint8.

    Raises:
        KeyError: an emoji isn't in the archive.
    """
    wanted = {code(emoji): name for name, emoji in characters.items()}
    found: dict[str, np.ndarray] = {}
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            points = PurePosixPath(member.name).stem.split("-")
            name = wanted.get("-".join(point for point in points if point != "fe0f"))
            file = members.extractfile(member) if name else None
            if name and file:
                found[name] = read_sprite(file.read())
    missing = sorted(set(characters) - set(found))
    if missing:
        raise KeyError(f"{archive} holds none of {missing}: leave these names out")
    return {name: found[name] for name in characters}


def write(sprites: Mapping[str, np.ndarray], folder: Path = DATA) -> None:
    """Write the sheet (`COLUMNS` sprites a row, WebP with alpha) and the list of its names."""
    rows = -(-len(sprites) // COLUMNS)
    sheet = np.zeros((rows * SIDE, COLUMNS * SIDE, 4), np.uint8)
    for i, sprite in enumerate(sprites.values()):
        top, left = i // COLUMNS * SIDE, i % COLUMNS * SIDE
        sheet[top : top + SIDE, left : left + SIDE] = sprite
    image = Image.fromarray(sheet)
    image.save(folder / SHEET_FILE, quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=6, exact=True)
    (folder / TABLE_FILE).write_text(json.dumps(list(sprites), indent=0) + "\n", encoding="ascii")


def main() -> None:
    """Rebuilds both files in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the archive is or is downloaded to")
    folder = parser.parse_args().folder
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    table = json.loads((DATA / "names.json").read_text(encoding="ascii"))
    characters = {row["name"]: row["characters"] for row in table}
    archive = download(URL, folder / PurePosixPath(URL).name, SHA256)
    sprites = collect(archive, {name: characters[name] for name in STARTER})
    write(sprites)
    logger.info("%d sprites, %.2f MB", len(sprites), (DATA / SHEET_FILE).stat().st_size / 1e6)


if __name__ == "__main__":
    main()
