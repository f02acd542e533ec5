"""Marks that say, to programs, that an image or a clip was generated: written into files, read back as untrusted text.

Article 50(2) of Regulation (EU) 2024/1689 asks that outputs of generative systems carry machine-readable marks. Ours is
XMP with the property `DigitalSourceType` of the IPTC Photo Metadata Standard (its values: the IPTC NewsCodes), the tool
(`xmp:CreatorTool`) and the model (`AISystemUsed`, IPTC 2025.1). It stands beside the settings of
`apps.service.metadata`, and is written where those are left out too. Signed marks are
`apps.service.content_credentials`.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape

from PIL import Image

from apps.service import xmp
from apps.service.content_credentials import (
    Credentials,
    SourceType,
    read_credentials,
    sign,
    sign_file,
    signing_identity,
)

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
"""Begins the values of `DigitalSourceType`."""
GENERATED_TERMS = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "algorithmicMedia",
                   "compositeSynthetic", "algorithmicallyEnhanced")  # fmt: skip
"""Terms of the vocabulary for what a program made, as a whole or in part."""
MAX_VALUE = 200
"""Characters of a property that are kept of a file."""
MAX_DEPTH = 32
"""Elements within elements of a packet that are followed."""
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters that XML can't hold, or that change how a line of text is shown."""

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
XMP = "http://ns.adobe.com/xap/1.0/"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
SOURCE, TOOL, MODEL = f"{IPTC} DigitalSourceType", f"{XMP} CreatorTool", f"{IPTC} AISystemUsed"

PACKET = f"""<?xpacket begin="\N{ZERO WIDTH NO-BREAK SPACE}" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{RDF}">
  <rdf:Description rdf:about="" xmlns:xmp="{XMP}" xmlns:Iptc4xmpExt="{IPTC}">
   <xmp:CreatorTool>{{tool}}</xmp:CreatorTool>
   <Iptc4xmpExt:DigitalSourceType>{VOCABULARY}{{source_type}}</Iptc4xmpExt:DigitalSourceType>
   <Iptc4xmpExt:AISystemUsed>{{model}}</Iptc4xmpExt:AISystemUsed>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a file says about how it came to be.

    Attributes:
        source_type: term of the IPTC vocabulary of digital source types; '' for none that is known.
        tool: name and version of the program; '' if it isn't named.
        model: name of the model; '' if it isn't named.
    """

    source_type: str = ""
    tool: str = ""
    model: str = ""

    @property
    def is_generated(self) -> bool:
        """Whether a program made it, as a whole or in part."""
        return self.source_type in GENERATED_TERMS

    @property
    def is_composite(self) -> bool:
        """Whether a program made a part of it only."""
        return self.source_type in ("compositeWithTrainedAlgorithmicMedia", "compositeSynthetic",
                                    "algorithmicallyEnhanced")  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileOrigin:
    """What is known about where a file comes from.

    Attributes:
        stated: what its XMP says, which anybody can write; None if it says nothing that is understood.
        credentials: what its signature says; None for a file without one.
        problem: why XMP that is there was not read; '' if it was, or if there is none.
    """

    stated: Provenance | None = None
    credentials: Credentials | None = None
    problem: str = ""


class XmpError(ValueError):
    """A packet is none, or is not one that is read here."""


def generated_by(model: str, *, has_source: bool) -> Provenance:
    """Return the mark of what this program generates.

    Args:
        model: its name in the list it was chosen from.
        has_source: whether it was made from an image or a clip that somebody handed in.
    """
    from dit import __version__

    source_type: SourceType = "compositeWithTrainedAlgorithmicMedia" if has_source else "trainedAlgorithmicMedia"
    return Provenance(source_type, f"tessera {__version__}", model)


# ---------------------------------------------------------------------------- writing


def packet(mark: Provenance) -> bytes:
    """Return a mark as an XMP packet: RDF/XML in UTF-8, the same bytes for the same mark."""
    values = {name: escape(UNPRINTABLE.sub("", getattr(mark, name))) for name in ("source_type", "tool", "model")}
    return PACKET.format(**values).encode("utf-8")


def finish_file(path: Path, kind: xmp.Kind, mark: Provenance) -> None:
    """Write what Pillow or PyAV could not write of a mark, and sign the file if the user has configured that.

    Args:
        path: a complete file, which others don't read yet; it is changed in place.
        kind: its format. PNG, WebP and JPEG files have the packet already, see `apps.service.xmp.pillow_options`.
        mark: what the file says.

    Raises:
        UsageError: signing is configured, but not so that it works.
        ImportError: signing is configured, and c2pa-python is not installed.
    """
    if kind == "GIF":
        xmp.insert_into_gif(path, packet(mark))
    elif kind == "MP4":
        xmp.append_to_mp4(path, packet(mark))
    identity = signing_identity()
    if identity is not None:
        media_type = "video/mp4" if kind == "MP4" else f"image/{kind.lower()}"
        sign_file(path, media_type, identity, VOCABULARY + mark.source_type, mark.tool, mark.model)


def marked_bytes(
    image: Image.Image, kind: xmp.Kind, mark: Provenance, *, is_preview: bool = False, **options: Any
) -> bytes:
    """Return an image as a file with a mark, signed if the user has configured that.

    Args:
        image: the image.
        kind: `PNG`, `WEBP` or `JPEG`.
        mark: what the file says.
        is_preview: don't sign it: a time stamp authority would be asked at every step.
        **options: of `PIL.Image.Image.save`.

    Raises:
        ValueError: another format, or `finish_file`'s reasons.
        ImportError: signing is configured, and c2pa-python is not installed.
    """
    file = io.BytesIO()
    image.save(file, kind, **options, **xmp.pillow_options(kind, packet(mark)))
    identity = None if is_preview else signing_identity()
    if identity is None:
        return file.getvalue()
    signed = sign(file, f"image/{kind.lower()}", identity, VOCABULARY + mark.source_type, mark.tool, mark.model)
    return signed.getvalue()


# ---------------------------------------------------------------------------- reading


def read_origin(path: Path) -> FileOrigin:
    """Read what a file of any origin says about how it came to be, and check its signature.

    Args:
        path: an image or a clip; other files say nothing.

    Returns:
        What was found. Everything in it comes from the file: escape it.

    Raises:
        OSError: the file can't be read.
    """
    found = xmp.find_embedded(path)
    credentials = read_credentials(path, found.media_type) if found.has_manifest else None
    if found.packet is None:
        return FileOrigin(None, credentials)
    try:
        return FileOrigin(parse_packet(found.packet), credentials)
    except XmpError as error:
        return FileOrigin(None, credentials, str(error))


def parse_packet(data: bytes) -> Provenance | None:
    """Read an XMP packet of unknown origin.

    Nothing is loaded from elsewhere and nothing expands: a document type, in which entities are declared, is refused
    when it begins. Of properties that occur several times the first counts.

    Args:
        data: RDF/XML in UTF-8, at most `apps.service.xmp.MAX_PACKET` bytes.

    Returns:
        The properties that are known here, cut and without characters that aren't printed; None if there are none.

    Raises:
        XmpError: too long, not UTF-8, no XML, a document type, or elements too deep.
    """
    if len(data) > xmp.MAX_PACKET:
        raise XmpError(f"The XMP takes {len(data)} bytes; at most {xmp.MAX_PACKET} are read.")
    try:
        text = data.decode("utf-8").strip("\x00 \t\r\n\N{ZERO WIDTH NO-BREAK SPACE}")
    except UnicodeDecodeError as error:
        raise XmpError("The XMP is not UTF-8.") from error
    values = _Properties().read(text)
    term = values.get(SOURCE, "")
    known = re.fullmatch(re.escape(VOCABULARY) + r"([A-Za-z]{1,64})", term.replace("https://", "http://", 1))
    found = Provenance(known[1] if known else "", values.get(TOOL, ""), values.get(MODEL, ""))
    return None if found == Provenance() else found


class _Properties:
    """Collects the known properties of a packet: as attributes, as text of elements, or as `rdf:resource`."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}
        self._open: list[str] = []
        self._text = ""

    def read(self, text: str) -> dict[str, str]:
        """Return the values by 'namespace name'."""
        parser = expat.ParserCreate(encoding="utf-8", namespace_separator=" ")
        parser.StartDoctypeDeclHandler = _refuse_doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._add_text
        try:
            parser.Parse(text.encode("utf-8"), True)
        except expat.ExpatError as error:
            raise XmpError("The XMP is no XML.") from error
        return self._found

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._open.append(name)
        if len(self._open) > MAX_DEPTH:
            raise XmpError(f"The XMP has more than {MAX_DEPTH} elements within each other.")
        self._text = ""
        for key, value in attributes.items():
            self._keep(name if key == f"{RDF} resource" else key, value)

    def _end(self, name: str) -> None:
        self._keep(name, self._text)
        self._open.pop()
        self._text = ""

    def _add_text(self, text: str) -> None:
        self._text += text

    def _keep(self, name: str, value: str) -> None:
        value = UNPRINTABLE.sub("", value).strip()[:MAX_VALUE]
        if name in (SOURCE, TOOL, MODEL) and value:
            self._found.setdefault(name, value)


def _refuse_doctype(*_: object) -> None:
    raise XmpError("The XMP declares a document type, which could name other files; such packets are not read.")
