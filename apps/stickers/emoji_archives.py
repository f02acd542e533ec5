"""What the scripts that build sheets of Fluent emoji share: archives of npm, names of their files, clean edges."""

import hashlib
import logging
import urllib.request
from pathlib import Path

import numpy as np

VISIBLE = 8  # alpha (of 255) above which a pixel counts as visible

logger = logging.getLogger(__name__)


def download(url: str, path: Path, sha256: str) -> Path:
    """Download an archive, unless it is there already, and check it.

    Args:
        url: where it comes from.
        path: where it goes; its folder is made.
        sha256: its checksum.

    Returns:
        `path`.

    Raises:
        ValueError: its checksum is another one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        logger.info("downloading %s", url)
        partial = path.with_suffix(".part")
        urllib.request.urlretrieve(url, partial)
        partial.rename(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has the sha256 {found}, not {sha256}: delete it to download it again")
    return path


def code(characters: str) -> str:
    """Return the code points of an emoji as the archives' files are called, without variation selectors."""
    return "-".join(f"{ord(character):04x}" for character in characters if character != "\ufe0f")


def clean_edges(image: np.ndarray) -> np.ndarray:
    """Make what is nearly transparent or nearly opaque wholly so, in place; it also compresses better.

    Args:
        image: (H, W, 4) uint8, straight alpha.
    """
    alpha = image[..., 3]
    alpha[alpha <= VISIBLE] = 0
    alpha[alpha >= 255 - VISIBLE] = 255
    return image
