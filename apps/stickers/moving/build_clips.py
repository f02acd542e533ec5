"""Rebuilds the clip sheet from animated Fluent emoji (`python -m apps.stickers.moving.build_clips FOLDER`).

Nobody needs this to train or to evaluate: its products, `data/clips.webp` and `data/clips.json`, are shipped.
It downloads four archives of npm (730 MB in all) into FOLDER, unless they are there already. Which clips are taken,
and in which words they are described, stands in `data/verbs.json`: that was written by looking at the clips.
"""

import argparse
import io
import json
import logging
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence

from apps.stickers.build_sprites import fit
from apps.stickers.emoji_archives import VISIBLE, clean_edges, code, download
from apps.stickers.moving.clips import LENGTH, SIDE
from apps.stickers.moving.measure import measure
from apps.stickers.sprites import DATA

URL = "https://registry.npmjs.org/@lobehub/fluent-emoji-anim-{0}/-/fluent-emoji-anim-{0}-1.0.0.tgz"
SHA256 = {
    1: "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    2: "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    3: "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    4: "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
}
CLOSED = 1e-4  # mean square difference under which the last frame of a file repeats its first
QUALITY = 85  # of the colours, of 100
ALPHA_QUALITY = 90

logger = logging.getLogger(__name__)


def open_archives(folder: Path) -> Iterator[tarfile.TarFile]:
    """Download what is missing, and open the archives one after the other, to be read from front to back.

    Raises:
        ValueError: an archive's checksum is another one.
    """
    for number, expected in SHA256.items():
        path = download(URL.format(number), folder / f"anim-{number}.tgz", expected)
        with tarfile.open(path, "r|gz") as archive:
            yield archive


def read_frames(data: bytes) -> np.ndarray:
    """Read an animated WebP file: its frames evenly over one loop, cropped to the box that holds all of them.

    Returns:
        `(16, 72, 72, 4)` uint8, straight alpha.
    """
    with Image.open(io.BytesIO(data)) as file:
        frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(file)]
    first, last = (np.asarray(frame.resize((SIDE, SIDE)), dtype=np.float32) / 255 for frame in (frames[0], frames[-1]))
    period = len(frames) - int(np.square(first - last).mean() < CLOSED)
    chosen = [frames[i * period // LENGTH] for i in range(LENGTH)]
    alpha = np.stack([np.asarray(frame)[..., 3] for frame in chosen]).max(0)  # (H, W)
    rows, columns = (np.flatnonzero((alpha > VISIBLE).any(axis)) for axis in (1, 0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return np.stack([clean_edges(fit(frame.crop(box), SIDE)) for frame in chosen])


def collect(folder: Path, characters: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Read the clips of the given names.

    Args:
        folder: where the archives are or go to.
        characters: for each name its emoji.

    Raises:
        KeyError: an emoji is in none of the archives.
    """
    wanted = {code(emoji): name for name, emoji in characters.items()}
    clips: dict[str, np.ndarray] = {}
    for archive in open_archives(folder):
        for member in archive:
            points = Path(member.name).stem.split("-")
            name = wanted.get("-".join(point for point in points if point != "fe0f"))
            file = archive.extractfile(member) if name else None
            if name and file:
                clips[name] = read_frames(file.read())
    missing = sorted(set(characters) - set(clips))
    if missing:
        raise KeyError(f"no archive holds {missing}: take these names out of verbs.json")
    return clips


def write(clips: Mapping[str, np.ndarray], words: Sequence[Mapping[str, Any]]) -> None:
    """Write the sheet (one clip a row, WebP with alpha), and the table of names, words and measurements.

    Measured is what the sheet holds after compression.

    Args:
        clips: `(16, 72, 72, 4)` uint8 for each name.
        words: the rows of `verbs.json`: "name", "verb", "noun" where that isn't the name, "also" other words for it.
    """
    rows = [np.concatenate(list(clips[row["name"]]), axis=1) for row in words]  # each (72, 16 * 72, 4)
    image = Image.fromarray(np.concatenate(rows))
    path = DATA / "clips.webp"
    image.save(path, quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=6, exact=True)
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGBA"))  # (C * 72, 16 * 72, 4)
    lines = []
    for number, row in enumerate(words):
        frames = sheet[number * SIDE : (number + 1) * SIDE].reshape(SIDE, LENGTH, SIDE, 4).transpose(1, 3, 0, 2)
        motion = asdict(measure(torch.from_numpy(frames.copy())))
        motion = {key: round(value, 4) if isinstance(value, float) else value for key, value in motion.items()}
        name = row["name"]
        about = {"name": name, "noun": row.get("noun", name), "verb": row["verb"], "also": row.get("also", [])}
        lines.append(json.dumps(about | motion))
    (DATA / "clips.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="ascii")


def main() -> None:
    """Rebuilds both files in place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the archives are or are downloaded to")
    folder = parser.parse_args().folder
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = json.loads((DATA / "verbs.json").read_text(encoding="ascii"))
    table = json.loads((DATA / "names.json").read_text(encoding="ascii"))
    characters = {row["name"]: row["characters"] for row in table}
    clips = collect(folder, {row["name"]: characters[row["name"]] for row in words})
    write(clips, words)
    logger.info("%d clips, %.2f MiB", len(clips), (DATA / "clips.webp").stat().st_size / 2**20)


if __name__ == "__main__":
    main()
