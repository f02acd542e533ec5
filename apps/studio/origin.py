"""What a file says about how it was made, in the language of the page."""

from __future__ import annotations

from pathlib import Path

from apps.service.content_credentials import Credentials
from apps.service.provenance import FileOrigin, Provenance, read_origin
from apps.studio.strings import Strings


def origin_of(path: Path, words: Strings) -> str:
    """Read how a file was made and whether that is signed.

    Args:
        path: an image or a clip of any origin; a file that is gone says nothing.
        words: of the page.

    Returns:
        One or two sentences, '' for a file that says nothing. They repeat texts of the file: escape them.
    """
    return "" if not path.is_file() else describe_origin(read_origin(path), words)


def describe_origin(origin: FileOrigin, words: Strings) -> str:
    """Say what was found in a file, see `origin_of`."""
    said = [
        words("origin.unreadable") if origin.problem else "",
        "" if origin.stated is None else _made(origin.stated, words),
        "" if origin.credentials is None else _signed(origin.credentials, words),
    ]
    return " ".join(sentence for sentence in said if sentence)


def _made(stated: Provenance, words: Strings) -> str:
    how = "composite" if stated.is_composite else "generated" if stated.is_generated else "written"
    named = [stated.tool or words("origin.nobody")]
    named += [words("origin.model", model=stated.model)] if stated.model else []
    return words(f"origin.{how}", by=words("origin.comma").join(named))


def _signed(credentials: Credentials, words: Strings) -> str:
    signer = credentials.signer or words("origin.nobody")
    return words(f"signature.{credentials.state}", signer=signer, problems=", ".join(credentials.problems))
