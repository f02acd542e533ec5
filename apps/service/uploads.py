"""Images that people hand in: checked, freed of everything but their pixels, and kept under the hash of those.

The hash is the only name an image has, so a request can neither point at a file nor guess another's image, and a
finished image tells exactly what it was made from.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import threading
import warnings
from pathlib import Path
from typing import BinaryIO, Protocol

from PIL import Image, ImageOps

from apps.service import limits
from apps.service.metadata import save_picture
from apps.service.request_error import RequestError

logger = logging.getLogger(__name__)

NAME = re.compile(r"[0-9a-f]{64}")


class UploadError(RequestError):
    """What was handed in is no image that can be used."""


Source = bytes | Path | BinaryIO
"""A file, open or by its path, or the content of one."""


def read_upload(data: Source) -> Image.Image:
    """Decode an image of unknown origin.

    Args:
        data: the file, or its content: PNG, JPEG or WebP.

    Returns:
        Its pixels, RGB, upright; transparency is laid on white, nothing else of the file is kept.

    Raises:
        UploadError: too large, or no such image.
    """
    return flatten(_decode(data))


def read_mask(data: Source, size: tuple[int, int]) -> Image.Image:
    """Decode a mask that is transparent where an image is to be changed.

    Args:
        data: the file, or its content: PNG or WebP with transparency.
        size: width and height of the image that it is for.

    Returns:
        L, white where to change.

    Raises:
        UploadError: too large, no such image, opaque everywhere, or of another size.
    """
    image = _decode(data)
    if image.size != size:
        raise UploadError(
            f"The mask has {image.width} x {image.height} pixels and the image {size[0]} x {size[1]}; send one of the "
            "image's size."
        )
    opaque = image.convert("RGBA").getchannel("A")
    mask = opaque.point([255 if value < 128 else 0 for value in range(256)])
    if mask.getbbox() is None:
        raise UploadError("The mask is opaque everywhere; make it transparent where the image is to be changed.")
    return mask


def _decode(data: Source) -> Image.Image:
    """Decode an image of unknown origin, upright; its size is looked at before its pixels."""
    opened = io.BytesIO(data) if isinstance(data, bytes) else data
    size = opened.stat().st_size if isinstance(opened, Path) else opened.seek(0, io.SEEK_END)
    if size > limits.MAX_UPLOAD_BYTES:
        raise UploadError(
            "upload.bytes",
            f"The image has {size} bytes; at most {limits.MAX_UPLOAD_BYTES} are taken.",
            value=size,
            most=limits.MAX_UPLOAD_BYTES,
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # counted here, and lower
            with Image.open(opened, formats=["PNG", "JPEG", "WEBP"]) as image:
                if max(image.size) > limits.MAX_UPLOAD_SIDE:  # a strip takes far longer to decode than its pixels say
                    raise UploadError(
                        "upload.side",
                        f"The image has {image.width} x {image.height} pixels; at most "
                        f"{limits.MAX_UPLOAD_SIDE} along a side are taken.",
                        value=f"{image.width} x {image.height}",
                        most=limits.MAX_UPLOAD_SIDE,
                    )
                if image.width * image.height > limits.MAX_UPLOAD_PIXELS:
                    raise UploadError(
                        "upload.pixels",
                        f"The image has {image.width} x {image.height} pixels; at most "
                        f"{limits.MAX_UPLOAD_PIXELS} pixels are taken.",
                        value=f"{image.width} x {image.height}",
                        most=limits.MAX_UPLOAD_PIXELS,
                    )
                image.load()
                return ImageOps.exif_transpose(image)
    except UploadError:
        raise
    except Image.DecompressionBombError as error:
        most = limits.MAX_UPLOAD_PIXELS
        raise UploadError(
            "upload.claims", f"The image claims too many pixels; at most {most} are taken.", most=most
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UploadError("upload.form", "This is no image that can be read; upload PNG, JPEG or WebP.") from error


def flatten(image: Image.Image) -> Image.Image:
    """Return an image as RGB, its transparent parts on white."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut off at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def picture_id(image: Image.Image) -> str:
    """Return the hash of an image's pixels: 64 hex digits, the same for every file that shows them."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


class UploadRecords(Protocol):
    """Where it is recorded who handed in what, see `JobStore`."""

    def use_upload(self, name: str, owner: str, size: int) -> None: ...  # noqa: D102

    def stale_uploads(self, owner: str, most: int, most_bytes: int, seconds: float) -> list[str]: ...  # noqa: D102

    def drop_upload(self, name: str, owner: str) -> bool: ...  # noqa: D102


class UploadStore:
    """The images handed in.

    Args:
        folder: where they are kept as PNG files; None keeps them in memory.
        records: who handed in what; None for no quota and no expiry.
        quota: what each user may keep.
    """

    def __init__(
        self, folder: Path | None, records: UploadRecords | None = None, quota: limits.UploadQuota | None = None
    ) -> None:
        self._folder = folder
        self._records = records
        self._quota = quota or limits.UploadQuota()
        self._memory: dict[str, Image.Image] = {}
        self._cut: set[str] = set()  # of those in memory
        self.decoding = threading.Lock()  # held while an image of unknown origin is decoded
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def receive(self, data: Source, owner: str = "local") -> tuple[str, tuple[int, int]]:
        """Decode an image of unknown origin and keep it.

        One at a time: a decoded image takes many times the memory of its file.

        Args:
            data: the file, or its content.
            owner: who hands it in.

        Returns:
            Its hash, and its width and height.

        Raises:
            UploadError: too large, or no image.
        """
        with self.decoding:
            image = read_upload(data)
            return self.add(image, owner), image.size

    def receive_mask(self, data: Source, image: str, owner: str = "local") -> str:
        """Decode a mask that is transparent where an image is to be changed, and keep it.

        Args:
            data: the file, or its content.
            image: hash of the image that it is for.
            owner: who hands it in.

        Returns:
            Its hash.

        Raises:
            UploadError: see `read_mask`.
        """
        with self.decoding:
            return self.add(read_mask(data, self.size(image)), owner)

    def add(self, image: Image.Image, owner: str = "local", *, is_cut: bool = False) -> str:
        """Keep an image and return its hash; what its owner has beyond the quota goes.

        Args:
            image: the image.
            owner: who hands it in.
            is_cut: it is the beginning of something longer.
        """
        rgb = flatten(image)
        name = picture_id(rgb)
        if self._folder is None:
            self._memory[name] = rgb
            (self._cut.add if is_cut else self._cut.discard)(name)
            return name
        file, mark = self._file(name), self._cut_mark(name)
        if not file.is_file():
            save_picture(rgb, file, None, is_fast=True)
        mark.touch() if is_cut else mark.unlink(missing_ok=True)
        if self._records is not None:
            self._records.use_upload(name, owner, file.stat().st_size)
            self._tidy(owner)
        return name

    def check(self, name: str, owner: str = "local") -> None:
        """Check that an image is here, without decoding it, and note that it is used.

        Raises:
            UploadError: it isn't here.
        """
        if self._folder is None:
            self.get(name)
            return
        if not NAME.fullmatch(name) or not self._file(name).is_file():
            raise _absent(name)
        if self._records is not None:
            self._records.use_upload(name, owner, self._file(name).stat().st_size)

    def is_cut(self, name: str) -> bool:
        """Return whether an image is the beginning of something longer, as it was handed in last."""
        if self._folder is None:
            return name in self._cut
        return NAME.fullmatch(name) is not None and self._cut_mark(name).exists()

    def size(self, name: str) -> tuple[int, int]:
        """Return width and height of an image, without decoding it.

        Raises:
            UploadError: it isn't here.
        """
        if name in self._memory:
            return self._memory[name].size
        with self._open(name) as image:
            return image.size

    def get(self, name: str) -> Image.Image:
        """Return an image by its hash.

        Raises:
            UploadError: it isn't here.
        """
        if name in self._memory:
            return self._memory[name].copy()
        with self._open(name) as image:
            return image.convert("RGB")

    def _open(self, name: str) -> Image.Image:
        if self._folder is None or not NAME.fullmatch(name):
            raise _absent(name)
        try:
            return Image.open(self._file(name), formats=["PNG"])
        except OSError as error:
            raise _absent(name) from error

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.png"

    def _cut_mark(self, name: str) -> Path:
        return self._file(name).with_suffix(".cut")

    def _tidy(self, owner: str) -> None:
        """Remove what an owner has beyond the quota, and what was not used for long."""
        if self._records is None:
            return
        quota = self._quota
        for name in self._records.stale_uploads(owner, quota.pictures, quota.bytes, quota.seconds):
            if self._records.drop_upload(name, owner):
                self._file(name).unlink(missing_ok=True)
                self._cut_mark(name).unlink(missing_ok=True)


def _absent(name: str) -> UploadError:
    message = f"The image {name[:12]}... has not been uploaded here, or long ago; upload it again."
    return UploadError("upload.missing", message, value=f"{name[:12]}...")
