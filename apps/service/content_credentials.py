"""Signed Content Credentials (C2PA) in images and clips: written by a user's own certificate, read and checked.

The user configures who signs, by variables of the environment: see `Variable`. Nothing is signed without them, and no
certificate is ever made here. Needs c2pa-python (`pip install 'tessera[c2pa]'`), C2PA specification 2.x.

Reading asks no other machine: manifests that a file says are elsewhere are not fetched, nor is the revocation of
certificates asked for.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from PIL import Image

from apps.service.usage import UsageError

SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
"""Terms of the IPTC vocabulary of digital source types that this program writes."""
Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]
State = Literal["trusted", "valid", "invalid", "unchecked"]

CERTIFICATE = "TESSERA_C2PA_CERTIFICATE"
"""File with the certificate that signs, and those behind it except the root (PEM)."""
KEY = "TESSERA_C2PA_KEY"
"""File with its private key (PEM, PKCS #8, without a password)."""
ALGORITHM = "TESSERA_C2PA_ALGORITHM"
"""Signature algorithm of the key; `es256` if absent."""
TIMESTAMP = "TESSERA_C2PA_TIMESTAMP"
"""URL of a time stamp authority (RFC 3161), which is asked for each file; none if absent."""
TRUST = "TESSERA_C2PA_TRUST"
"""File with the root certificates (PEM) that signatures are trusted by when files are read."""

MAX_PEM = 256 * 1_024
MAX_TEXT = 200
"""Characters of a name in a certificate that are kept."""
UNTRUSTED = "signingCredential.untrusted"


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningIdentity:
    """Who signs.

    Attributes:
        certificate: chain in PEM, the signing certificate first.
        key: its private key in PEM.
        algorithm: of the signature.
        timestamp_url: of a time stamp authority; None for none.
    """

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    algorithm: Algorithm = "es256"
    timestamp_url: str | None = None


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the signature of a file says, as far as it was checked.

    Attributes:
        state: `trusted`: intact, and by a certificate that leads to a configured root; `valid`: intact, but nothing
            says whose certificate it is; `invalid`: the file was changed, or the signature is wrong; `unchecked`:
            c2pa-python is not installed.
        signer: name in the certificate; anybody can choose it unless the state is `trusted`.
        source_type: the digital source type that is signed, a URL; '' if there is none.
        tool: name and version of the program that is signed.
        problems: codes of the C2PA specification for what is wrong, such as `assertion.dataHash.mismatch`.
    """

    state: State
    signer: str = ""
    source_type: str = ""
    tool: str = ""
    problems: tuple[str, ...] = ()


# ---------------------------------------------------------------------------- who signs


def signing_identity(environ: Mapping[str, str] | None = None) -> SigningIdentity | None:
    """Return who signs here, or None if nobody was configured.

    Args:
        environ: variables; those of the process if None.

    Raises:
        UsageError: only one of certificate and key is named, one can't be read, or the algorithm is unknown.
        ImportError: c2pa-python is not installed.
    """
    values = os.environ if environ is None else environ
    certificate, key = values.get(CERTIFICATE), values.get(KEY)
    if not certificate and not key:
        return None
    if not certificate or not key:
        given, missing = (CERTIFICATE, KEY) if certificate else (KEY, CERTIFICATE)
        raise UsageError(f"{given} is set and {missing} is not; set both to sign files, or neither.")
    algorithm = values.get(ALGORITHM) or "es256"
    if algorithm not in get_args(Algorithm):
        raise UsageError(f"{ALGORITHM} is {algorithm!r}; accepted are {', '.join(get_args(Algorithm))}.")
    url = values.get(TIMESTAMP) or None
    if url is not None and not url.startswith(("http://", "https://")):
        raise UsageError(f"{TIMESTAMP} is {url!r}; give a URL that begins with http:// or https://.")
    if importlib.util.find_spec("c2pa") is None:
        raise ImportError(f"{CERTIFICATE} is set, and signing needs c2pa-python: pip install 'tessera[c2pa]'.")
    return SigningIdentity(
        certificate=_read_pem(CERTIFICATE, certificate),
        key=_read_pem(KEY, key),
        algorithm=algorithm,  # type: ignore[arg-type]
        timestamp_url=url,
    )


def check_signing() -> None:
    """Sign a small image if signing is configured, so that a mistake is found before an image is generated.

    Raises:
        UsageError: certificate, key and algorithm don't sign.
        ImportError: c2pa-python is not installed.
    """
    identity = signing_identity()
    if identity is None:
        return
    image = io.BytesIO()
    Image.new("RGB", (1, 1)).save(image, "PNG")
    source_type = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    _sign(image, io.BytesIO(), "image/png", identity, _manifest(source_type, "tessera", ""))


def _read_pem(variable: str, name: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            data = file.read(MAX_PEM + 1)
    except OSError as error:
        raise UsageError(f"{variable} names {name!r}, which can't be read ({error.strerror}).") from error
    if len(data) > MAX_PEM or b"-----BEGIN " not in data:
        raise UsageError(f"{variable} names {name!r}, which is no PEM file of at most {MAX_PEM} bytes.")
    return data


# ---------------------------------------------------------------------------- signing


def sign_file(path: Path, media_type: str, identity: SigningIdentity, source_type: str, tool: str, model: str) -> None:
    """Sign a file and put the Content Credentials into it.

    Args:
        path: a complete file with its metadata, which is replaced: later changes make the signature invalid.
        media_type: such as `image/png`.
        identity: who signs.
        source_type: URL of the digital source type.
        tool: name and version of the program.
        model: name of the model.

    Raises:
        UsageError: certificate, key and algorithm don't sign.
        OSError: the file can't be written.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with path.open("rb") as source, partial.open("x+b") as signed:
            _sign(source, signed, media_type, identity, _manifest(source_type, tool, model))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sign(
    file: BinaryIO, media_type: str, identity: SigningIdentity, source_type: str, tool: str, model: str
) -> io.BytesIO:
    """Return an open file with Content Credentials in memory, see `sign_file`."""
    signed = io.BytesIO()
    _sign(file, signed, media_type, identity, _manifest(source_type, tool, model))
    return signed


def _manifest(source_type: str, tool: str, model: str) -> dict[str, Any]:
    """Return what is signed: that the file was created, by which program, as what (C2PA 2.x, actions assertion)."""
    name, _, version = tool.partition(" ")
    agent = {"name": name, **({"version": version} if version else {})}
    action = {"action": "c2pa.created", "digitalSourceType": source_type, "softwareAgent": agent}
    if model:
        action["description"] = f"Generated with the model {model}."
    return {
        "claim_generator_info": [agent],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }


def _sign(
    source: BinaryIO, signed: BinaryIO, media_type: str, identity: SigningIdentity, manifest: dict[str, Any]
) -> None:
    import c2pa

    try:
        info = c2pa.C2paSignerInfo(identity.algorithm, identity.certificate, identity.key, identity.timestamp_url)
        signer = c2pa.Signer.from_info(info)
        source.seek(0)
        with c2pa.Builder(json.dumps(manifest), context=_context({})) as builder:
            builder.sign(signer, media_type, source, signed)
    except c2pa.C2paError.Io as error:  # type: ignore[attr-defined]
        raise OSError(f"The signed file could not be written ({_cut(str(error))}).") from error
    except c2pa.C2paError as error:
        raise UsageError(
            f"The file could not be signed ({_cut(str(error))}); {CERTIFICATE}, {KEY} and {ALGORITHM} "
            f"({identity.algorithm}) must belong together, and the certificate must allow signing."
        ) from error


def _context(trust: dict[str, Any]) -> Any:
    """Return settings of c2pa for one call: it asks no other machine, and makes no thumbnails."""
    import c2pa

    values = {
        "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_trust": True},
        "builder": {"thumbnail": {"enabled": False}},
        **trust,
    }
    return c2pa.Context(settings=c2pa.Settings.from_dict(values))


# ---------------------------------------------------------------------------- reading


def read_credentials(path: Path, media_type: str, environ: Mapping[str, str] | None = None) -> Credentials:
    """Check the Content Credentials that are embedded in a file of any origin.

    Args:
        path: the file.
        media_type: of it, such as `image/png`.
        environ: variables, of which `TRUST` is read; those of the process if None.

    Returns:
        What was found; texts in it come from the file: escape them.

    Raises:
        UsageError: the file that `TRUST` names can't be read.
        OSError: the file can't be read.
    """
    if importlib.util.find_spec("c2pa") is None:
        return Credentials("unchecked")
    import c2pa

    roots = (os.environ if environ is None else environ).get(TRUST)
    trust = {"trust": {"trust_anchors": _read_pem(TRUST, roots).decode("utf-8", "replace")}} if roots else {}
    try:
        with path.open("rb") as file, c2pa.Reader(media_type, file, context=_context(trust)) as reader:
            return _read_report(json.loads(reader.json()))
    except c2pa.C2paError as error:
        return Credentials("invalid", problems=(_cut(str(error).partition(":")[0]),))


def _read_report(report: Any) -> Credentials:
    """Pick out of c2pa's report what is shown; whatever is missing or of another type is left out."""
    manifest = _get(report, "manifests", _get(report, "active_manifest"))
    codes = tuple(dict.fromkeys(_cut(_get(one, "code")) for one in _list(_get(report, "validation_status"))))
    state: State = {"Trusted": "trusted", "Valid": "valid"}.get(_get(report, "validation_state"), "invalid")  # type: ignore[assignment]
    actions = [
        action
        for assertion in _list(_get(manifest, "assertions"))
        if str(_get(assertion, "label")).startswith("c2pa.actions")
        for action in _list(_get(assertion, "data", "actions"))
        if _get(action, "digitalSourceType")
    ]
    first = actions[0] if actions else {}
    agent = _get(first, "softwareAgent") or next(iter(_list(_get(manifest, "claim_generator_info"))), {})
    tool = agent if isinstance(agent, str) else f"{_get(agent, 'name')} {_get(agent, 'version')}".strip()
    signer = _get(manifest, "signature_info", "common_name") or _get(manifest, "signature_info", "issuer")
    problems = tuple(code for code in codes if state == "invalid" or code != UNTRUSTED)
    return Credentials(state, _cut(signer), _cut(_get(first, "digitalSourceType")), _cut(tool), problems)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _get(value: Any, *keys: str) -> Any:
    """Return what stands under keys within each other; '' where a level has no such key."""
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            return ""
        value = value[key]
    return value


def _cut(value: object) -> str:
    """Return a text of a file without characters that aren't printed, and not too long."""
    return "".join(letter for letter in str(value or "") if letter.isprintable())[:MAX_TEXT]
