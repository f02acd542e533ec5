"""Pictures that people hand in: checked, freed of everything but their pixels, and kept under the hash of those.

The hash is the only name a picture has, so a request can neither point at a file nor guess another's picture, and a
finished picture tells exactly what it was made from.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from apps import limits
from apps.metadata import save_picture
from apps.request_error import RequestError


class UploadError(RequestError):
    """What was handed in is no picture that can be used."""


def read_upload(data: bytes) -> Image.Image:
    """Decode a picture of unknown origin.

    Args:
        data: the file's content: PNG, JPEG or WebP.

    Returns:
        Its pixels, RGB, upright; transparency is laid on white, nothing else of the file is kept.

    Raises:
        UploadError: too large, or no such picture.
    """
    if len(data) > limits.MAX_UPLOAD_BYTES:
        raise UploadError(
            "upload.bytes",
            f"The picture has {len(data)} bytes; at most {limits.MAX_UPLOAD_BYTES} are taken.",
            value=len(data),
            most=limits.MAX_UPLOAD_BYTES,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # counted here, and lower
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]) as image:
                if image.width * image.height > limits.MAX_UPLOAD_PIXELS:
                    raise UploadError(
                        "upload.pixels",
                        f"The picture has {image.width} x {image.height} pixels; at most "
                        f"{limits.MAX_UPLOAD_PIXELS} pixels are taken.",
                        value=f"{image.width} x {image.height}",
                        most=limits.MAX_UPLOAD_PIXELS,
                    )
                image.load()
                return flatten(ImageOps.exif_transpose(image))
    except UploadError:
        raise
    except Image.DecompressionBombError as error:
        most = limits.MAX_UPLOAD_PIXELS
        raise UploadError(
            "upload.claims", f"The picture claims too many pixels; at most {most} are taken.", most=most
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UploadError("upload.form", "This is no picture that can be read; hand in PNG, JPEG or WebP.") from error


def flatten(image: Image.Image) -> Image.Image:
    """Return a picture as RGB, its transparent parts on white."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def picture_id(image: Image.Image) -> str:
    """Return the hash of a picture's pixels: 64 hex digits, the same for every file that shows them."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


class UploadStore:
    """The pictures handed in.

    Args:
        folder: where they are kept as PNG files; None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, Image.Image] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, image: Image.Image) -> str:
        """Keep a picture and return its hash."""
        rgb = flatten(image)
        name = picture_id(rgb)
        if self._folder is None:
            self._memory[name] = rgb
        elif not (self._folder / f"{name}.png").is_file():
            save_picture(rgb, self._folder / f"{name}.png", None)
        return name

    def get(self, name: str) -> Image.Image:
        """Return a picture by its hash.

        Raises:
            UploadError: it isn't here.
        """
        if re.fullmatch(r"[0-9a-f]{64}", name):
            if name in self._memory:
                return self._memory[name]
            if self._folder is not None and (file := self._folder / f"{name}.png").is_file():
                with Image.open(file, formats=["PNG"]) as image:
                    return image.convert("RGB")
        raise UploadError(
            "upload.missing",
            f"The picture {name[:12]}... has not been handed in here; hand it in first.",
            value=f"{name[:12]}...",
        )
