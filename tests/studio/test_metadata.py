from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from apps.service import limits
from apps.service.metadata import CHUNK, MetadataError, PictureSettings, parse, read_picture, save_picture

SETTINGS = PictureSettings(
    prompt='ein "roter" Apfel \u2603 \U0001f34e',
    seed=42,
    steps=28,
    guidance=4.5,
    height=64,
    width=96,
    model="stickers",
    fingerprint="0123456789abcdef",
    scheduler={"class": "Euler", "shift": 3.0},
    versions={"torch": "2"},
)


def test_settings_survive_the_file(tmp_path):
    picture = Image.effect_noise((96, 64), 50).convert("RGB")
    path = save_picture(picture, tmp_path / "a.png", SETTINGS)
    assert read_picture(path) == SETTINGS
    assert Image.open(path).tobytes() == picture.tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@given(text=st.text(max_size=300))
def test_any_prompt_survives_json(text):
    settings = SETTINGS.model_copy(update={"prompt": text})
    assert parse(settings.model_dump_json()) == settings


JSON_VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(text=st.text(max_size=200) | JSON_VALUES.map(json.dumps))
def test_untrusted_text_is_refused_in_one_way_only(text):
    with pytest.raises(MetadataError):
        parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 10**9},
        {"seed": -1},
        {"height": 10**6},
        {"prompt": "x" * 5_000},
        {"fingerprint": "../../etc"},
        {"extra": 1},
        {"schema_version": 5},
        {"scheduler": {"a": {"nested": 1}}},
    ],
)
def test_values_out_of_range_are_refused_by_name(change):
    with pytest.raises(MetadataError, match=next(iter(change))):
        parse(json.dumps({**json.loads(SETTINGS.model_dump_json()), **change}))


def test_hostile_names_do_not_reach_the_message():
    with pytest.raises(MetadataError) as caught:
        parse('{"<script>alert(1)</script>": 1}')
    assert "<" not in str(caught.value)


def test_long_text_is_refused_before_it_is_parsed(tmp_path):
    with pytest.raises(MetadataError, match="at most"):
        parse(" " * (limits.MAX_METADATA_BYTES + 1))
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt(CHUNK, "{" * 200_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=chunk)
    with pytest.raises(MetadataError):
        read_picture(tmp_path / "bomb.png")


def test_foreign_files_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    for name, reason in (("plain.png", "no settings"), ("photo.jpg", "not a readable"), ("text.png", "not a readable")):
        with pytest.raises(MetadataError, match=reason):
            read_picture(tmp_path / name)


def test_a_failed_write_leaves_nothing(tmp_path):
    class Broken(Image.Image):
        def save(self, file, **kwargs):
            file.write(b"half")
            raise KeyboardInterrupt

    (tmp_path / "a.png").write_bytes(b"older")
    with pytest.raises(KeyboardInterrupt):
        save_picture(Broken(), tmp_path / "a.png", SETTINGS)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]
    with pytest.raises(ValueError, match=r"\.png"):
        save_picture(Image.new("RGB", (4, 4)), tmp_path / "a.jpg", SETTINGS)


def test_paths_stay_inside(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    assert limits.inside(tmp_path / "in" / "x.png", tmp_path / "in") == tmp_path / "in" / "x.png"
    for path in (tmp_path / "in" / ".." / "x", tmp_path / "in" / "link" / "x", Path("/etc/passwd")):
        with pytest.raises(ValueError, match="not inside"):
            limits.inside(path, tmp_path / "in")


def test_output_folders_that_show_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for broad in (tmp_path, tmp_path.parent, Path("/"), Path.home()):
        with pytest.raises(ValueError, match="too broad"):
            limits.output_folder(broad)
    assert limits.output_folder(Path("pictures")) == tmp_path / "pictures"
    assert (tmp_path / "pictures").is_dir()
