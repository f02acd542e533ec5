"""The gallery's rows and files: search, paging, favourites, boards, deleting with undo, archives, old databases."""

from __future__ import annotations

import io
import json
import sqlite3
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from apps.service import archive, gallery, gallery_schema, gallery_store
from apps.service.gallery import Gallery, GoneError
from apps.service.gallery_store import NoBoardError, Person, Wanted
from apps.service.job_store import JobStore, StoredPicture
from apps.service.request_error import RequestError
from apps.service.thumbnails import SIDE, Thumbnails

ANN, BOB, ROOT = Person("ann"), Person("bob"), Person("root", sees_all=True)
PROMPTS = ("a red apple", "A RED fox 100%", "a_green pear", "\u4e00\u53ea\u732b", "two words")


def settings_of(prompt, **changes):
    return json.dumps({"prompt": prompt, "model": "stickers", "seed": 1, "width": 64, "height": 32, **changes})


def open_gallery(folder):
    (folder / "out").mkdir(exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    jobs = JobStore(folder / "state" / "jobs.sqlite")
    return SimpleNamespace(
        jobs=jobs, out=folder / "out", trash=folder / "state" / "trash",
        gallery=Gallery(jobs, folder / "out", folder / "state"), folder=folder,
    )  # fmt: skip


def paint(world, owner, prompt, number, **changes):
    """Record an image with its file; returns the number of its row."""
    job, name = f"{number:016x}", f"picture-{number}.png"
    world.jobs.add(job, owner, "{}", 1000, 1000)
    Image.new("RGB", (64, 32), (number, 30, 30)).save(world.out / name)
    world.jobs.add_picture(StoredPicture(job, 0, name, settings_of(prompt, **changes), 1.0))
    return world.gallery.numbers(ROOT, Wanted())[0]


@pytest.fixture
def world(tmp_path):
    opened = open_gallery(tmp_path)
    opened.numbers = [paint(opened, "ann", prompt, i) for i, prompt in enumerate(PROMPTS)]
    opened.bobs = paint(opened, "bob", "a red boat", 50, model="other")
    yield opened
    opened.jobs.close()


def prompts(world, **wanted):
    return [item.text for item in world.gallery.page(ANN, Wanted(**wanted), 100)]


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("red", ["A RED fox 100%", "a red apple"]),
        ("RED a", ["A RED fox 100%", "a red apple"]),
        ("100%", ["A RED fox 100%"]),
        ("%", ["A RED fox 100%"]),
        ("_", ["a_green pear"]),
        ("a_green", ["a_green pear"]),
        ("\u732b", ["\u4e00\u53ea\u732b"]),
        ("\u4e00\u53ea\u732b", ["\u4e00\u53ea\u732b"]),
        ('" OR text:', []),
        ("NEAR(red)", []),
        ("red\0", []),
        ("", list(reversed(PROMPTS))),
    ],
)
def test_words_are_found_as_they_are(world, text, found, is_indexed):
    """With the index of texts and without it the same; nothing means anything to SQLite."""
    assert world.gallery._is_indexed
    world.gallery._is_indexed = is_indexed
    assert prompts(world, text=text) == found
    assert world.gallery.count(ANN, Wanted(text=text)) == len(found)


def test_filters_go_together(world):
    clip = paint(world, "ann", "a red clip", 60, frames=9, fps=8.0, model="mover")
    world.gallery.mark(ANN, [clip, world.numbers[0]], True)
    assert prompts(world, kind="clip") == ["a red clip"]
    assert prompts(world, model="mover", text="red") == ["a red clip"]
    assert prompts(world, favourites=True) == ["a red clip", "a red apple"]
    assert prompts(world, favourites=True, kind="image") == ["a red apple"]
    now = world.gallery.items(ANN, [clip])[0].created
    assert prompts(world, since=now + 1) == []
    assert prompts(world, until=now + 1, text="clip") == ["a red clip"]
    assert world.gallery.models(ANN) == ["mover", "stickers"]
    (item,) = world.gallery.items(ANN, [clip])
    assert (item.kind, item.frames, item.fps, item.width, item.favourite) == ("clip", 9, 8.0, 64, True)


def test_pages_are_stable_while_images_come_and_go(world):
    first = world.gallery.page(ANN, Wanted(), 2)
    paint(world, "ann", "a newcomer", 70)
    world.gallery.remove(ANN, [first[0].number])
    second = world.gallery.page(ANN, Wanted(), 2, before=first[-1].number)
    assert [item.text for item in [*first, *second]] == list(reversed(PROMPTS))[:4]


def test_an_image_that_is_recorded_again_keeps_its_number(world):
    before = world.gallery.numbers(ANN, Wanted())
    world.jobs.add_picture(StoredPicture(f"{1:016x}", 0, "picture-1.png", settings_of(PROMPTS[1]), 2.0))
    assert world.gallery.numbers(ANN, Wanted()) == before


def test_nobody_meets_images_of_others(world):
    mine = world.gallery
    assert mine.numbers(BOB, Wanted()) == [world.bobs]
    assert mine.items(BOB, world.numbers) == []
    assert mine.mark(BOB, world.numbers, True) == []
    assert mine.remove(BOB, world.numbers).numbers == ()
    board = mine.add_board(BOB, "mine").number
    assert mine.put_on_board(BOB, board, world.numbers) == []
    for change in (
        lambda: mine.put_on_board(ANN, board, world.numbers),
        lambda: mine.rename_board(ANN, board, "hers"),
        lambda: mine.remove_board(ANN, board),
        lambda: mine.numbers(ROOT, Wanted(board=board)),
    ):
        with pytest.raises(NoBoardError):
            change()
    gone = mine.remove(ANN, world.numbers[:1])
    assert mine.restore(BOB, gone.batch) == ()
    assert mine.empty_trash(BOB) == 0
    assert mine.empty_trash(ROOT) == 0  # what an administrator deleted of others is theirs
    assert mine.restore(ANN, gone.batch) == tuple(world.numbers[:1])
    assert len(mine.numbers(ROOT, Wanted())) == 6
    mine.mark(ROOT, world.numbers, True)
    assert prompts(world, favourites=True) == []  # each has favourites of the own


def test_boards_are_named_filled_and_removed(world):
    mine, (first, second, *_) = world.gallery, world.numbers
    board = mine.add_board(ANN, "  fruit \n salad ")
    assert mine.put_on_board(ANN, board.number, [first, second, second, 10**6]) == [first, second]
    assert [(one.name, one.count) for one in mine.boards(ANN)] == [("fruit salad", 2)]
    assert mine.boards_of(ANN, first) == [board.number]
    assert mine.boards_of(ROOT, first) == []
    assert prompts(world, board=board.number) == list(reversed(PROMPTS[:2]))
    mine.put_on_board(ANN, board.number, [first], is_on=False)
    mine.rename_board(ANN, board.number, "nuts")
    assert [(one.name, one.count) for one in mine.boards(ANN)] == [("nuts", 1)]
    mine.rename_board(ANN, board.number, "nuts")
    mine.add_board(ANN, "other")
    for name in ("", " ", "x" * 81, "a\0b", "other"):
        with pytest.raises(RequestError):
            mine.rename_board(ANN, board.number, name)
    mine.remove_board(ANN, board.number)
    assert len(mine.numbers(ANN, Wanted())) == len(PROMPTS)


def test_too_many_boards_are_refused(world, monkeypatch):
    monkeypatch.setattr(gallery_store, "MAX_BOARDS", 1)
    world.gallery.add_board(ANN, "one")
    with pytest.raises(RequestError, match="delete one first"):
        world.gallery.add_board(ANN, "two")


def test_a_deleted_clip_comes_back_bit_for_bit_with_its_files(world):
    clip = paint(world, "ann", "a clip", 60, frames=9, fps=8.0)
    picture = world.out / "picture-60.png"
    files = [picture, picture.with_suffix(".mp4"), world.out / "picture-60.png.json"]
    files[1].write_bytes(b"moving")
    files[2].write_text("{}")
    before = [file.read_bytes() for file in files]
    gone = world.gallery.remove(ANN, [clip])
    assert [file.exists() for file in files] == [False] * 3
    assert clip not in world.gallery.numbers(ANN, Wanted())
    assert world.jobs.owner_of_file("picture-60.png") is None
    assert "picture-60.png" not in [one.name for one in world.jobs.history("ann", 100)]
    assert world.gallery.restore(ANN, gone.batch) == (clip,)
    assert [file.read_bytes() for file in files] == before
    assert world.jobs.owner_of_file("picture-60.png") == "ann"
    assert list(world.trash.iterdir()) == []
    assert world.gallery.restore(ANN, gone.batch) == ()


def test_the_sheet_of_a_grid_goes_with_its_cell_and_comes_back(world):
    Image.new("RGB", (90, 90)).save(world.out / "grid.png")
    jobs = [f"{i:016x}" for i in range(2)]
    for _ in range(2):  # once on record, whoever looks
        world.gallery.add_sheet("ann", "grid.png", "a red apple", "stickers", (90, 90), jobs)
    assert prompts(world, kind="sheet") == ["a red apple"]
    assert world.jobs.owner_of_file("grid.png") == "ann"
    gone = world.gallery.remove(ANN, [world.numbers[0]])
    assert len(gone.numbers) == 2
    assert not (world.out / "grid.png").exists()
    assert set(world.gallery.restore(ANN, gone.batch)) == set(gone.numbers)
    assert (world.out / "grid.png").is_file()
    alone = world.gallery.remove(ANN, [item.number for item in world.gallery.page(ANN, Wanted(kind="sheet"), 9)])
    assert len(alone.numbers) == 1  # the cells stay
    assert prompts(world) == list(reversed(PROMPTS))


def test_the_trash_is_purged_after_its_time_and_on_demand(world, monkeypatch):
    mine, (first, second, *_) = world.gallery, world.numbers
    world.gallery.thumbnail(mine.items(ANN, [first])[0])
    mine.mark(ANN, [first], True)
    gone = mine.remove(ANN, [first])
    assert mine.purge_old() == 0
    monkeypatch.setattr(gallery, "TRASH_SECONDS", -1.0)
    assert mine.purge_old() == 1
    assert mine.restore(ANN, gone.batch) == ()
    assert not list(world.trash.rglob("*.png"))
    assert not list((world.folder / "state" / "thumbnails").iterdir())
    assert [one.name for one in world.jobs.pictures(f"{0:016x}")] == [""]  # done, without a file
    monkeypatch.undo()
    mine.remove(ANN, [second])
    mine.remove(BOB, [world.bobs])
    assert mine.empty_trash(ANN) == 1
    assert len(mine.deleted()) == 1


def test_what_a_crash_left_in_between_is_settled(world):
    mine, (first, second, *_) = world.gallery, world.numbers
    mine.delete(ANN, [first])  # its row only
    mine.remove(ANN, [second])
    mine.undelete([second])  # its row only
    world.jobs.close()
    again = open_gallery(world.folder)
    assert not (again.out / "picture-0.png").exists()
    assert (again.out / "picture-1.png").is_file()
    again.jobs.close()


def test_an_older_database_gets_its_gallery(tmp_path):
    (tmp_path / "state").mkdir()
    db = sqlite3.connect(tmp_path / "state" / "jobs.sqlite")
    db.executescript("""
        CREATE TABLE jobs(number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL,
            request TEXT NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL,
            ended REAL, code TEXT NOT NULL DEFAULT '', message TEXT NOT NULL DEFAULT '');
        CREATE TABLE pictures(job TEXT NOT NULL, place INTEGER NOT NULL, name TEXT NOT NULL, settings TEXT NOT NULL,
            seconds REAL NOT NULL, PRIMARY KEY(job, place)) WITHOUT ROWID;""")
    for i in range(3):
        row = (f"{i:016x}", "ann", "{}", "done", 100.0 + i, 200.0 + i)
        db.execute("INSERT INTO jobs(id, owner, request, state, created, ended) VALUES (?, ?, ?, ?, ?, ?)", row)
        db.execute(
            "INSERT INTO pictures VALUES (?, 0, ?, ?, 1.0)", (f"{i:016x}", f"{i}.png", settings_of(f"a fox {i}"))
        )
    db.execute("INSERT INTO pictures VALUES (?, 1, 'x.png', '', 1.0)", (f"{0:016x}",))  # settings that can't be read
    db.commit()
    db.close()
    for _ in range(2):  # the second time nothing is missing
        opened = open_gallery(tmp_path)
        items = opened.gallery.page(ANN, Wanted(text="fox"), 10)
        assert [(item.text, item.created) for item in items] == [(f"a fox {i}", 200.0 + i) for i in (2, 1, 0)]
        assert opened.gallery.numbers(ANN, Wanted()) == [3, 2, 1]
        opened.jobs.close()


def test_a_database_of_another_sqlite_is_searched_without_the_index(tmp_path, monkeypatch):
    opened = open_gallery(tmp_path)
    paint(opened, "ann", "a red apple", 0)
    opened.jobs.close()
    with monkeypatch.context() as patched:
        broken = gallery_schema.TEXTS.replace("trigram", "no_such_tokenizer").replace("gallery_texts", "other_texts")
        patched.setattr(gallery_schema, "TEXTS", broken)
        opened = open_gallery(tmp_path)
        assert not opened.gallery._is_indexed
        paint(opened, "ann", "a red pear", 1)
        assert [item.text for item in opened.gallery.page(ANN, Wanted(text="red"), 9)] == ["a red pear", "a red apple"]
        opened.jobs.close()
    opened = open_gallery(tmp_path)
    assert opened.gallery._is_indexed
    assert len(opened.gallery.numbers(ANN, Wanted(text="red"))) == 2
    opened.jobs.close()


def test_an_archive_holds_the_files_under_safe_names(world):
    clip = paint(world, "ann", "a clip", 60, frames=9, fps=8.0)
    (world.out / "picture-60.mp4").write_bytes(b"moving" * 100_000)
    data = b"".join(world.gallery.archive(world.gallery.items(ANN, [clip, world.numbers[0]])))
    with zipfile.ZipFile(io.BytesIO(data)) as packed:
        assert packed.testzip() is None
        assert packed.namelist() == ["picture-60.png", "picture-60.mp4", "picture-0.png"]
        assert all(packed.read(name) == (world.out / name).read_bytes() for name in packed.namelist())
    hostile = [Path("/a/../-rf.png"), Path("/a/.hidden.png"), Path("/a/c:d\u202e.png"), Path("/b/c:d\u202e.png")]
    assert archive.safe_names(hostile) == ["_rf.png", "_hidden.png", "c_d_.png", "c_d_-2.png"]


def test_an_archive_is_not_larger_than_it_may_be(world, monkeypatch):
    items = world.gallery.items(ANN, world.numbers)
    monkeypatch.setattr(gallery, "MAX_ARCHIVE_BYTES", 10)
    with pytest.raises(RequestError, match="choose fewer"):
        world.gallery.archive(items)
    (world.out / "picture-0.png").unlink()
    with pytest.raises(RequestError, match="None of the images"):
        world.gallery.archive(items[:1])
    with pytest.raises(GoneError):
        world.gallery.file(items[0])


def test_small_versions_are_made_once_and_shared_by_equal_images(tmp_path, monkeypatch):
    Image.linear_gradient("L").resize((900, 300)).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    small = Thumbnails(tmp_path / "small")
    made = small.get(tmp_path / "a.png")
    with Image.open(made) as image:
        assert (image.format, max(image.size)) == ("WEBP", SIDE)
    first = small.get(tmp_path / "a.png", (300, 300))
    with Image.open(first) as image:
        assert image.size == (SIDE, SIDE)
    monkeypatch.setattr("apps.service.thumbnails._shrink", lambda *_: pytest.fail("made again"))
    assert small.get(tmp_path / "b.png") == made
    assert Thumbnails(tmp_path / "small").get(tmp_path / "a.png") == made
    small.forget(tmp_path / "b.png")
    assert list((tmp_path / "small").iterdir()) == []
