"""Marks in files: where other programs look for them, read back, hostile packets, signatures."""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import json
import struct
import threading
from types import SimpleNamespace
from xml.etree import ElementTree

import av
import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageSequence, PngImagePlugin

from apps.cli import main
from apps.commands.file_info import origin_sentence, signature_sentence
from apps.commands.outputs import check_output, save
from apps.service import content_credentials, xmp
from apps.service.content_credentials import CERTIFICATE, KEY, TRUST, Credentials
from apps.service.grid import Axis
from apps.service.media import Clip, read_mp4, save_mp4
from apps.service.metadata import (
    MetadataError,
    PictureSettings,
    mark_of,
    read_picture,
    save_animation,
    save_picture,
)
from apps.service.provenance import Provenance, XmpError, marked_bytes, packet, parse_packet, read_origin
from apps.service.requests import TextToImageRequest
from apps.service.sheet import GridSettings, save_sheet
from apps.service.usage import UsageError
from apps.studio.origin import describe_origin
from apps.studio.settings_handlers import SettingsHandlers
from apps.studio.strings import Strings
from dit import __version__
from tests.studio.certificates import make_certificates
from tests.studio.serving import client_of, serving_page

MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CHANGED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
SETTINGS = PictureSettings(
    prompt="a fox", seed=7, steps=2, height=32, width=32, model='<b>"stickers" & \u2603', fingerprint="0" * 16
)
COMPOSITE = SETTINGS.model_copy(update={"task": "inpaint", "image": "a" * 64, "mask": "b" * 64})
MARK = Provenance("trainedAlgorithmicMedia", f"tessera {__version__}", SETTINGS.model)
FRAMES = tuple(Image.effect_noise((32, 32), 60 + i).convert("RGB") for i in range(4))
CLIP = Clip(FRAMES, 8.0)
WRITERS = {
    ".png": lambda path, settings, **more: save_picture(FRAMES[0], path, settings, **more),
    ".webp": lambda path, settings, **more: save_picture(FRAMES[0], path, settings, **more),
    ".animated.webp": lambda path, settings, **more: save_animation(FRAMES, 8.0, path, settings, **more),
    ".gif": lambda path, settings, **more: save_animation(FRAMES, 8.0, path, settings, **more),
    ".mp4": lambda path, settings, **more: save_mp4(CLIP, path, settings, **more),
    ".jpg": lambda path, settings, **_: path.write_bytes(marked_bytes(FRAMES[0], "JPEG", mark_of(settings))),
}
"""Every format that generated files are written in."""


def png_packet(data):
    at = 8
    while data[at + 4 : at + 8] != b"IEND":
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 8 : at + 8 + length]
        if data[at + 4 : at + 8] == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\x00"):
            assert body[18:22] == bytes(4), "not compressed, no language"
            assert at < data.index(b"IDAT"), "before the pixels"
            return body[22:]
        at += 12 + length
    return None


def webp_packet(data):
    assert struct.unpack("<I", data[4:8])[0] == len(data) - 8
    assert data[12:16] == b"VP8X"
    assert data[20] & 4, "the flag that there is XMP"
    at = 12
    while at < len(data):
        name, length = struct.unpack("<4sI", data[at : at + 8])
        if name == b"XMP ":
            return data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return None


def jpeg_packet(data):
    at = data.index(b"\xff\xe1", 2)
    (length,) = struct.unpack(">H", data[at + 2 : at + 4])
    name, _, found = data[at + 4 : at + 2 + length].partition(b"\x00")
    assert name == b"http://ns.adobe.com/xap/1.0/"
    return found


def gif_packet(data):
    start = data.index(b"\x21\xff\x0bXMP DataXMP") + 14
    at = start  # as decoders do that don't know it: block by block
    while data[at]:
        at += 1 + data[at]
    assert at < data.index(b"\x21\xf9"), "before the first frame"
    return data[start : at - 257]


def mp4_packet(data):
    at, found = 0, None
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        if name == b"uuid" and data[at + 8 : at + 24].hex().upper() == "BE7ACFCB97A942E89C71999491E3AFAC":
            found = data[at + 24 : at + length]
        at += length
    with av.open(io.BytesIO(data), options={"export_xmp": "1"}) as file:
        assert file.metadata["xmp"].encode() == found
    return found


PARSERS = {".png": png_packet, ".webp": webp_packet, ".animated.webp": webp_packet, ".gif": gif_packet,
           ".mp4": mp4_packet, ".jpg": jpeg_packet}  # fmt: skip
"""Finds a packet as the format's specification has it; independent of what writes and reads it in `apps`."""


@pytest.fixture
def signing(tmp_path, monkeypatch):
    (tmp_path / "keys").mkdir()
    chain, key, root = make_certificates(tmp_path / "keys")
    monkeypatch.setenv(CERTIFICATE, str(chain))
    monkeypatch.setenv(KEY, str(key))
    return SimpleNamespace(chain=chain, key=key, root=root)


# ---------------------------------------------------------------------------- written


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("keep", [True, False], ids=["settings", "bare"])
def test_every_format_has_its_mark_where_others_look_for_it(ending, keep, tmp_path):
    path = tmp_path / f"a{ending}"
    for settings, source_type in ((SETTINGS, MADE), (COMPOSITE, CHANGED)):
        WRITERS[ending](path, settings, keep_settings=keep)
        root = ElementTree.fromstring(PARSERS[ending](path.read_bytes()).decode("utf-8-sig"))
        assert [one.text for one in root.iter(f"{IPTC}DigitalSourceType")] == [source_type]
        assert [one.text for one in root.iter(f"{IPTC}AISystemUsed")] == [SETTINGS.model]
        assert [one.text for one in root.iter("{http://ns.adobe.com/xap/1.0/}CreatorTool")] == [
            f"tessera {__version__}"
        ]
        origin = read_origin(path)
        assert origin.stated == mark_of(settings)
        assert (origin.credentials, origin.problem) == (None, "")
        assert origin.stated.is_generated
        assert origin.stated.is_composite is (settings is COMPOSITE)


@pytest.mark.parametrize("ending", [ending for ending in WRITERS if ending != ".jpg"])
def test_the_mark_changes_neither_pixels_nor_settings(ending, tmp_path):
    marked, plain = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    WRITERS[ending](marked, SETTINGS)
    WRITERS[ending](plain, None)
    assert (read_mp4 if ending == ".mp4" else read_picture)(marked) == SETTINGS
    assert read_origin(plain).stated is None, "what was not generated here has no mark"
    if ending == ".mp4":
        with av.open(marked) as one, av.open(plain) as other:
            pairs = list(zip(one.decode(video=0), other.decode(video=0), strict=True))
        assert len(pairs) == len(FRAMES)
        assert all((a.to_ndarray() == b.to_ndarray()).all() for a, b in pairs)
        return
    with Image.open(marked) as one, Image.open(plain) as other:
        assert one.info.get("loop") == other.info.get("loop")
        frames = [[frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(file)] for file in (one, other)]
    assert frames[0] == frames[1]


def test_bare_files_have_no_settings(tmp_path):
    for ending, write in WRITERS.items():
        if ending == ".jpg":
            continue
        write(tmp_path / f"a{ending}", SETTINGS, keep_settings=False)
        with pytest.raises(MetadataError, match="no settings"):
            (read_mp4 if ending == ".mp4" else read_picture)(tmp_path / f"a{ending}")


def test_what_is_made_of_uploads_is_composite():
    for name in ("image", "last_image", "mask"):
        assert mark_of(SETTINGS.model_copy(update={name: "a" * 64})).is_composite
    assert mark_of(SETTINGS.model_copy(update={"video": "a" * 64, "video_frames": 3})).is_composite
    assert not mark_of(SETTINGS).is_composite


def test_sheets_of_grids_are_marked(tmp_path):
    asked = TextToImageRequest(prompt="a fox", seed=1, model="stickers")
    settings = GridSettings(axes=(Axis("steps", ("2", "3")), Axis(), Axis()), request=asked)
    for keep in (True, False):
        path = save_sheet(FRAMES[0], tmp_path / "sheet.png", settings, keep_settings=keep)
        assert parse_packet(png_packet(path.read_bytes())) == Provenance(
            "trainedAlgorithmicMedia", f"tessera {__version__}", "stickers"
        )


def test_command_lines_mark_what_they_write_without_its_settings(tmp_path):
    picture = SimpleNamespace(image=FRAMES[0], clip=CLIP, metadata=SETTINGS)
    for path in (path for name in ("a.png", "b.gif") for path in save(picture, tmp_path / name, keep_settings=False)):
        assert read_origin(path).stated == MARK


def test_files_of_the_server_keep_the_mark(tmp_path):
    with serving_page(tmp_path, with_users=False) as served, client_of(served) as client:
        asked = {"task": "text_to_image", "prompt": "a fox", "steps": 1, "seed": 3, "keep_settings": False}
        asked |= {"width": 64, "height": 64}
        events = list(served.engine.generate(TextToImageRequest(**asked)))
        (picture,) = (event for event in events if hasattr(event, "metadata"))
        answer = client.get(f"/outputs/{picture.path.name}")
        assert answer.content == picture.path.read_bytes()
        assert parse_packet(png_packet(answer.content)) == mark_of(picture.metadata)
        body = {"prompt": "a fox", "size": "64x64", "output_format": "jpeg"}
        made = client.post("/v1/images/generations", json=body).json()
        data = base64.b64decode(made["data"][0]["b64_json"])
        assert parse_packet(jpeg_packet(data)).source_type == "trainedAlgorithmicMedia"


# ---------------------------------------------------------------------------- hostile


@given(model=st.text(max_size=80), tool=st.text(max_size=80))
def test_any_name_makes_a_packet_that_says_it(model, tool):
    found = parse_packet(packet(Provenance("trainedAlgorithmicMedia", tool, model)))
    assert found.source_type == "trainedAlgorithmicMedia"
    for said, meant in ((found.model, model), (found.tool, tool)):
        assert said == "".join(xmp_text for xmp_text in meant if not is_dropped(xmp_text)).strip()


def is_dropped(letter):
    code = ord(letter)
    return (
        code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0x200E, 0x200F, 0xFFFE, 0xFFFF)
        or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    )  # fmt: skip


BODY = packet(MARK).decode().partition("?>")[2]
ENTITIES = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>' + BODY
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + BODY.replace("&lt;b&gt;", "&a;")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (ENTITIES.encode(), "document type"),
        (OUTSIDE.encode(), "document type"),
        (b"<!doctype x SYSTEM 'http://127.0.0.1/x.dtd'><x/>", "no XML"),
        (OUTSIDE.encode("utf-16"), "not UTF-8"),
        (b'<?xml version="1.0" encoding="utf-7"?>' + BODY.encode(), "no XML|document type"),
        (b"<x>" * 40 + b"</x>" * 40, "within each other"),
        (b"<x>" * 20_000, "within each other"),
        (b"<x>&undefined;</x>", "no XML"),
        (b"<x", "no XML"),
        (b"", "no XML"),
        (b"\xff\xfe", "not UTF-8"),
        (b" " * 100_000, "at most"),
    ],
)  # fmt: skip
def test_hostile_packets_are_refused(data, said, tmp_path):
    if b"utf-7" in data:  # what a declaration says counts for nothing: it is read as UTF-8
        assert parse_packet(data) == MARK
        return
    with pytest.raises(XmpError, match=said):
        parse_packet(data)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.webp", xmp=data or b" ")
    origin = read_origin(tmp_path / "a.webp")
    assert origin.stated is None
    assert bool(origin.problem) is (len(data) < xmp.MAX_PACKET)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_packet_or_refused(data):
    with contextlib.suppress(XmpError):
        assert parse_packet(data) is None


def test_only_terms_of_the_vocabulary_count_and_values_are_cut():
    for wrong in ("http://evil.example/trainedAlgorithmicMedia", MADE + "<i>", MADE + "/x", "javascript:alert(1)"):
        escaped = wrong.replace("<", "&lt;")
        assert parse_packet(BODY.replace(MADE, escaped).encode()).source_type == ""
    assert parse_packet(BODY.replace("stickers", "x" * 5_000).encode()).model == ("<b>" + '"' + "x" * 5_000)[:200]
    assert parse_packet(BODY.replace("stickers", "a\u202eb").encode()).model == SETTINGS.model.replace("stickers", "ab")
    assert parse_packet(b"<x/>") is None


def test_properties_are_read_in_each_form_that_rdf_has():
    head = (
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:xmp="http://ns.adobe.com/xap/1.0/" '
        'xmlns:q="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"><rdf:Description '
    )
    for body in (
        f'q:DigitalSourceType="{MADE}" xmp:CreatorTool="x 1"/></rdf:RDF>',
        f'xmp:CreatorTool="x 1"><q:DigitalSourceType rdf:resource="{MADE}"/></rdf:Description></rdf:RDF>',
        f"><q:DigitalSourceType>{MADE}</q:DigitalSourceType><xmp:CreatorTool>x 1</xmp:CreatorTool>"
        "</rdf:Description></rdf:RDF>",
    ):
        assert parse_packet((head + body).encode()) == Provenance("trainedAlgorithmicMedia", "x 1")


def test_broken_files_end_the_search(tmp_path):
    for ending, write in WRITERS.items():
        write(tmp_path / f"a{ending}", SETTINGS)
        data = (tmp_path / f"a{ending}").read_bytes()
        for cut in (*range(0, 64, 5), len(data) // 2, len(data) - 1):
            (tmp_path / "cut").write_bytes(data[:cut])
            assert read_origin(tmp_path / "cut").stated in (None, MARK)
    hostile = [
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**32 - 1, b"iTXt"),
        b"RIFF\xff\xff\xff\xffWEBPXMP \xff\xff\xff\xff",
        b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00" + struct.pack(">I4sQ", 1, b"uuid", 2**63),
        b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00" + struct.pack(">I4s", 4, b"uuid"),
        b"\xff\xd8\xff\xe1\x00\x00",
        b"GIF89a" + b"\xff" * 7,
        b"no image",
    ]
    for data in hostile:
        (tmp_path / "x").write_bytes(data)
        assert read_origin(tmp_path / "x").stated is None
    bomb = PngImagePlugin.PngInfo()
    bomb.add_itxt(xmp.PNG_KEYWORD, " " * 10_000_000, zip=True)
    FRAMES[0].save(tmp_path / "bomb.png", pnginfo=bomb)
    assert xmp.find_embedded(tmp_path / "bomb.png").packet is None


def test_one_compressed_packet_of_a_file_is_unpacked(tmp_path, monkeypatch):
    many, unpacked = PngImagePlugin.PngInfo(), []
    for _ in range(50):
        many.add_itxt(xmp.PNG_KEYWORD, " " * 100_000, zip=True)
    FRAMES[0].save(tmp_path / "many.png", pnginfo=many)
    unpack = xmp._itxt_packet
    monkeypatch.setattr(xmp, "_itxt_packet", lambda data: unpacked.append(data) or unpack(data))
    assert xmp.find_embedded(tmp_path / "many.png").packet is None
    assert len(unpacked) == 1, "a file of some megabytes would keep a processor busy for a quarter of a minute"


# ---------------------------------------------------------------------------- signed


@pytest.mark.parametrize("ending", WRITERS)
def test_signed_files_are_valid_until_they_are_changed(ending, tmp_path, signing, monkeypatch):
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, COMPOSITE)
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, "keys"]
    assert PARSERS[ending](path.read_bytes()) == packet(mark_of(COMPOSITE))
    origin = read_origin(path)
    assert origin.stated == mark_of(COMPOSITE)
    assert origin.credentials == Credentials("valid", "Test signer", CHANGED, f"tessera {__version__}")
    monkeypatch.setenv(TRUST, str(signing.root))
    assert read_origin(path).credentials.state == "trusted"
    if ending != ".jpg":
        assert (read_mp4 if ending == ".mp4" else read_picture)(path) == COMPOSITE
    data = path.read_bytes()
    path.write_bytes(data.replace(b"compositeWithTrained", b"somethingWithTrained", 1))
    changed = read_origin(path)
    assert changed.credentials.state == "invalid"
    assert any(problem.endswith(".mismatch") for problem in changed.credentials.problems)


def test_a_signature_of_another_certificate_is_not_trusted(tmp_path, signing, monkeypatch):
    (tmp_path / "others").mkdir()
    _, _, other = make_certificates(tmp_path / "others")
    path = save_picture(FRAMES[0], tmp_path / "a.png", SETTINGS)
    monkeypatch.setenv(TRUST, str(other))
    assert read_origin(path).credentials.state == "valid"


def test_names_in_certificates_are_cleaned_and_escaped(tmp_path, monkeypatch):
    chain, key, _ = make_certificates(tmp_path, signer="<script>\u202e[red]x")
    monkeypatch.setenv(CERTIFICATE, str(chain))
    monkeypatch.setenv(KEY, str(key))
    origin = read_origin(save_picture(FRAMES[0], tmp_path / "a.png", SETTINGS))
    assert origin.credentials.signer == "<script>[red]x"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({KEY: ""}, rf"{CERTIFICATE} is set and {KEY} is not"),
        ({CERTIFICATE: ""}, rf"{KEY} is set and {CERTIFICATE} is not"),
        ({KEY: "/nowhere/key.pem"}, "can't be read"),
        ({CERTIFICATE: __file__}, "no PEM file"),
        ({content_credentials.ALGORITHM: "rsa"}, r"'rsa'; accepted are es256"),
        ({content_credentials.TIMESTAMP: "ftp://x"}, "begins with http"),
        ({content_credentials.ALGORITHM: "ed25519"}, "must belong together"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_generated(changes, said, tmp_path, signing, monkeypatch):
    check_output(tmp_path / "a.png")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        check_output(tmp_path / "a.png")
    with pytest.raises(UsageError, match=said):
        save_picture(FRAMES[0], tmp_path / "a.png", SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["keys"], "nothing unsigned is left"


def test_without_the_package_signing_fails_and_reading_says_so(tmp_path, signing, monkeypatch):
    path = save_picture(FRAMES[0], tmp_path / "a.png", SETTINGS)
    monkeypatch.setattr(content_credentials.importlib.util, "find_spec", lambda name: None)
    assert read_origin(path).credentials == Credentials("unchecked")
    with pytest.raises(ImportError, match=r"tessera\[c2pa\]"):
        save_picture(FRAMES[0], tmp_path / "b.png", SETTINGS)
    monkeypatch.delenv(CERTIFICATE)
    monkeypatch.delenv(KEY)
    assert read_origin(save_picture(FRAMES[0], tmp_path / "c.png", SETTINGS)).credentials is None


def test_reading_asks_no_other_machine(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        body = packet(MARK).replace(
            b'rdf:about=""',
            b'rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
            b'dcterms:provenance="http://127.0.0.1:%d/a.c2pa"' % server.server_port,
        )
        FRAMES[0].save(tmp_path / "a.jpg", xmp=body)
        assert read_origin(tmp_path / "a.jpg").credentials is None
        found = content_credentials.read_credentials(tmp_path / "a.jpg", "image/jpeg", {})
        assert found.state == "invalid"
        server.shutdown()
    assert asked == []


# ---------------------------------------------------------------------------- shown


def test_info_tells_how_a_file_was_made(tmp_path, signing, capsys):
    path = save_picture(FRAMES[0], tmp_path / "a.png", COMPOSITE)
    with pytest.raises(SystemExit) as left:
        main(["info", str(path)])
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"partly generated by tessera {__version__} with {SETTINGS.model}" in said
    assert "valid, by a certificate that names Test signer" in said
    assert "a fox" in said
    with pytest.raises(SystemExit):
        main(["info", str(path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["generated"] is True
    assert told["signature"]["state"] == "valid"
    assert PictureSettings.model_validate(told["settings"]) == COMPOSITE
    with pytest.raises(SystemExit) as left:
        main(["info", str(tmp_path / "gone.png")])
    assert left.value.code == 2
    assert "can't be read" in capsys.readouterr().err


def test_info_of_foreign_files_says_what_is_missing(tmp_path, capsys):
    FRAMES[0].save(tmp_path / "plain.png")
    hostile = packet(Provenance("trainedAlgorithmicMedia", "[bold]x[/] <i>", "m"))
    FRAMES[0].save(tmp_path / "other.jpg", xmp=hostile)
    for name, said in (("plain.png", "does not say"), ("other.jpg", "generated by [bold]x[/] <i> with m")):
        with pytest.raises(SystemExit):
            main(["info", str(tmp_path / name)])
        assert said in capsys.readouterr().out


def test_info_prints_nothing_that_a_terminal_obeys(tmp_path, capsys):
    hostile = SETTINGS.model_copy(update={"prompt": "a fox\x1b[2J\x1b]0;x\x07 \x9b31m\u202e end", "model": "m\x1b[31m"})
    save_picture(FRAMES[0], tmp_path / "a.png", hostile)
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit):
            main(["info", str(tmp_path / "a.png"), *more])
        said = capsys.readouterr().out
        assert "a fox" in said
        assert not set(said) & set("\x1b\x07\x9b\u202e")


def test_each_state_of_a_signature_has_its_sentence():
    states = [Credentials(state, "S", problems=("p.q",)) for state in ("trusted", "valid", "invalid", "unchecked")]
    for language in ("en", "zh"):
        words = Strings(language)
        said = {words(f"signature.{one.state}", signer="S", problems="p.q") for one in states}
        assert len(said) == 4
    lines = [signature_sentence(one) for one in (None, *states)]
    assert len(set(lines)) == 5
    assert "INVALID (p.q)" in lines[3]
    assert "vouches" not in lines[1]
    assert origin_sentence(SimpleNamespace(stated=Provenance(tool="Editor 2"), problem="")) == "written by Editor 2"


def test_the_page_tells_it_of_files_that_are_handed_in(tmp_path, monkeypatch, signing):
    told = []
    monkeypatch.setattr(gr, "Info", told.append)
    handlers = SettingsHandlers.__new__(SettingsHandlers)
    handlers._words = Strings("en")
    monkeypatch.setattr(handlers, "_apply_settings", lambda settings, owner: {"seed": settings.seed})
    path = save_picture(FRAMES[0], tmp_path / "a.png", SETTINGS)
    assert handlers.load_settings(str(path)) == {"seed": 7}
    assert "Marked as generated by AI: tessera" in told[0]
    assert "&lt;b&gt;" in told[0]
    assert "<b>" not in told[0]
    assert "names Test signer" in told[0]
    FRAMES[0].save(tmp_path / "other.webp", xmp=packet(Provenance("algorithmicMedia", "<b>x", "m")))
    (shown,) = handlers.load_settings(str(tmp_path / "other.webp")).values()
    assert "carries no settings" in shown or "no settings" in shown
    assert "Marked as generated by AI: &lt;b&gt;x, model m." in shown
    broken = SimpleNamespace(problem="x", stated=None, credentials=None)
    assert "can't be read" in describe_origin(broken, handlers._words)
