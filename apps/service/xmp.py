"""XMP packets in image and clip files: where each format keeps one, how it is put there and found again.

Places as the XMP specification, part 3 (ISO 16684-3), has them, and as ExifTool looks for them: an iTXt chunk of PNG,
the `XMP ` chunk of WebP, an APP1 segment of JPEG, an application extension of GIF, a `uuid` box of MP4. Reading is for
files of any origin: it goes from part to part without decoding anything, and stops at limits of size and number.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from PIL import PngImagePlugin

Kind = Literal["PNG", "WEBP", "JPEG", "GIF", "MP4"]
"""Formats of files that are written with packets."""
MAX_PACKET = 64 * 1_024
"""Bytes of a packet that is read; longer ones count as absent."""
MAX_PARTS = 100_000
"""Chunks, segments or boxes of a file that are looked at."""
GIF_BEGINNING = 1_024 * 1_024
"""Bytes of a GIF that are looked at: its blocks are as short as 255 bytes."""

PNG_KEYWORD = "XML:com.adobe.xmp"
JPEG_PREFIX = b"http://ns.adobe.com/xap/1.0/\x00"
GIF_BLOCK = b"\x21\xff\x0bXMP DataXMP"
GIF_TRAILER = b"\x01" + bytes(range(255, -1, -1)) + b"\x00"
"""Behind a packet of GIF, which isn't cut into blocks: from any byte of it readers get to the end of the extension."""
MP4_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
MP4_C2PA_UUID = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a file carries beside pixels, as far as provenance goes.

    Attributes:
        media_type: such as `image/png`, found by the first bytes; '' for a format that isn't known here.
        packet: the XMP packet; None if there is none, or too long a one.
        has_manifest: whether a C2PA manifest (signed Content Credentials) is embedded.
    """

    media_type: str
    packet: bytes | None = None
    has_manifest: bool = False


# ---------------------------------------------------------------------------- writing


def pillow_options(kind: Kind, packet: bytes, text: PngImagePlugin.PngInfo | None = None) -> dict[str, Any]:
    """Return what `PIL.Image.Image.save` needs to write a packet.

    Args:
        kind: `PNG`, `WEBP` or `JPEG`.
        packet: UTF-8.
        text: further text chunks of a PNG, which the packet joins.

    Raises:
        ValueError: Pillow writes no packets into this format.
    """
    if kind == "PNG":
        chunks = text or PngImagePlugin.PngInfo()
        chunks.add_itxt(PNG_KEYWORD, packet.decode("utf-8"))
        return {"pnginfo": chunks}
    if kind in ("WEBP", "JPEG"):
        return {"xmp": packet}
    raise ValueError(f"kind is {kind!r}; Pillow writes XMP into 'PNG', 'WEBP' and 'JPEG'.")


def insert_into_gif(path: Path, packet: bytes) -> None:
    """Put a packet into a GIF file, before its first block.

    Args:
        path: the complete file, which is written anew.
        packet: UTF-8.
    """
    data = path.read_bytes()
    start = _gif_blocks_start(data)
    path.write_bytes(data[:start] + GIF_BLOCK + packet + GIF_TRAILER + data[start:])


def append_to_mp4(path: Path, packet: bytes) -> None:
    """Put a packet behind the last box of an MP4 file, where it moves no media data.

    Args:
        path: the complete file.
        packet: UTF-8.
    """
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 24 + len(packet), b"uuid") + MP4_UUID + packet)


# ---------------------------------------------------------------------------- reading


def find_embedded(path: Path) -> Embedded:
    """Find the XMP packet and the C2PA manifest of a file of any origin.

    Args:
        path: the file; its name says nothing about its format.

    Returns:
        What was found; of a broken file what stands before the break.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        return find_in(file)


def find_in(file: BinaryIO) -> Embedded:
    """Find the XMP packet and the C2PA manifest in an open file, see `find_embedded`.

    Args:
        file: seekable.
    """
    file.seek(0)
    head = file.read(16)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _collect("image/png", _png_parts(file))
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _collect("image/webp", _webp_parts(file))
    if head.startswith(b"\xff\xd8\xff"):
        return _collect("image/jpeg", _jpeg_parts(file))
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return _collect("image/gif", _gif_parts(file))
    if head[4:8] == b"ftyp":
        return _collect("video/mp4", _mp4_parts(file))
    return Embedded("")


Part = tuple[bytes | None, bool]
"""The packet that a part of a file holds, and whether the part is a C2PA manifest."""
MANIFEST: Part = (None, True)


def _collect(media_type: str, parts: Iterator[Part]) -> Embedded:
    """Take the first packet, and note whether any part is a manifest; a part that is cut off ends the search."""
    packet, has_manifest = None, False
    try:
        for (found, is_manifest), _ in zip(parts, range(MAX_PARTS), strict=False):
            packet = packet or found
            has_manifest |= is_manifest
    except (struct.error, IndexError):  # the file ends within a part
        return Embedded(media_type, packet, has_manifest)
    return Embedded(media_type, packet, has_manifest)


def _png_parts(file: BinaryIO) -> Iterator[Part]:
    position, has_met_xmp = 8, False
    while True:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        position += 12 + length
        if kind == b"iTXt" and not has_met_xmp and length <= MAX_PACKET + 512:
            data = file.read(length)
            has_met_xmp = data.startswith(PNG_KEYWORD.encode() + b"\x00")  # a file has one; many would take long
            yield _itxt_packet(data), False
        elif kind == b"caBX":
            yield MANIFEST
        else:
            yield None, False
        if kind == b"IEND":
            return


def _itxt_packet(data: bytes) -> bytes | None:
    keyword, _, rest = data.partition(b"\x00")
    if keyword != PNG_KEYWORD.encode() or len(rest) < 2:
        return None
    is_compressed = rest[0] == 1
    text = rest[2:].split(b"\x00", 2)[-1]  # behind the language and the translated keyword
    if is_compressed:
        try:
            text = zlib.decompressobj().decompress(text, MAX_PACKET + 1)
        except zlib.error:
            return None
    return text if len(text) <= MAX_PACKET else None


def _webp_parts(file: BinaryIO) -> Iterator[Part]:
    position = 12
    while True:
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8))
        position += 8 + length + length % 2
        if kind == b"XMP " and length <= MAX_PACKET:
            yield file.read(length), False
        else:
            yield None, kind == b"C2PA"


def _jpeg_parts(file: BinaryIO) -> Iterator[Part]:
    position = 2
    while True:
        file.seek(position)
        marker, length = struct.unpack(">HH", file.read(4))
        if marker in (0xFFD9, 0xFFDA) or marker >> 8 != 0xFF or length < 2:  # pixels begin, or it is no segment
            return
        position += 2 + length
        if marker == 0xFFE1:
            data = file.read(length - 2)
            is_packet = data.startswith(JPEG_PREFIX) and len(data) <= MAX_PACKET + len(JPEG_PREFIX)
            yield (data[len(JPEG_PREFIX) :] if is_packet else None), False
        else:
            yield None, marker == 0xFFEB and file.read(2) == b"JP"


def _gif_blocks_start(data: bytes) -> int:
    """Return where the blocks of a GIF begin: behind its header and its table of colours."""
    flags = data[10]
    return 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)


def _gif_parts(file: BinaryIO) -> Iterator[Part]:
    file.seek(0)
    data = file.read(GIF_BEGINNING)
    at = _gif_blocks_start(data)
    while data[at] != 0x3B:
        if data.startswith(GIF_BLOCK, at):
            start = at + len(GIF_BLOCK)
            end = data.find(GIF_TRAILER, start)
            if end < 0:
                return
            yield (data[start:end] if end - start <= MAX_PACKET else None), False
            at = end + len(GIF_TRAILER)
            continue
        yield None, data.startswith(b"\x21\xff\x0bC2PA_GIF", at)
        if data[at] == 0x21:
            at += 2
        elif data[at] == 0x2C:
            flags = data[at + 9]
            at += 11 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
        else:
            return
        while data[at]:
            at += 1 + data[at]
        at += 1


def _mp4_parts(file: BinaryIO) -> Iterator[Part]:
    position, end = 0, file.seek(0, io.SEEK_END)
    while position < end:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8))
            header = 16
        elif length == 0:  # the last box, which goes to the end
            length = end - position
        if length < header:
            return
        position += length
        if kind != b"uuid":
            yield None, False
            continue
        name, size = file.read(16), length - header - 16
        packet = file.read(size) if name == MP4_UUID and 0 <= size <= MAX_PACKET else None
        yield packet, name == MP4_C2PA_UUID
