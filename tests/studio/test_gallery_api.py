"""The gallery over HTTP: search, favourites, boards, deleting with undo, archives; and whose images these are."""

from __future__ import annotations

import io
import itertools
import json
import zipfile

import pytest
from PIL import Image

from apps.service.gallery_store import Person, Wanted
from apps.service.job_store import StoredPicture
from tests.studio.serving import bearer, client_of, serving_page

COUNTER = itertools.count(1)
SETTINGS = {"model": "fake", "seed": 7, "width": 64, "height": 32}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving_page(tmp_path_factory.mktemp("gallery")) as one:
        yield one


def record(served, owner, prompt, **changes):
    """Put a finished image on record; returns its number."""
    store, number = served.engine._store, next(COUNTER)
    job, name = f"{number:016x}", f"picture-{number}.png"
    Image.effect_noise((64, 32), number).convert("RGB").save(served.out / name)
    with store.using() as db:
        query = "INSERT INTO jobs(id, owner, request, state, created, ended) VALUES (?, ?, '{}', 'done', 1, 2)"
        db.execute(query, (job, owner))
    settings = json.dumps({**SETTINGS, "prompt": prompt, **changes})
    store.add_picture(StoredPicture(job, 0, name, settings, 1.5, "", '["a note"]'))
    return served.engine.gallery.numbers(Person("root", sees_all=True), Wanted())[0]


@pytest.fixture
def ann(served):
    with client_of(served, headers=bearer(served, "ann")) as client:
        yield client


@pytest.fixture
def bob(served):
    with client_of(served, headers=bearer(served, "bob")) as client:
        yield client


def ids(answer):
    assert answer.status_code == 200, answer.text
    return [row["id"] for row in answer.json()["images"]]


def test_images_are_searched_and_turned_page_by_page(served, ann):
    wanted = [record(served, "ann", f"a plum {i}") for i in range(5)]
    first = ann.get("/v1/images", params={"q": "PLUM", "limit": 3}).json()
    assert (first["count"], first["next"]) == (5, wanted[2])
    newcomer = record(served, "ann", "a plum 9")
    second = ann.get("/v1/images", params={"q": "plum", "limit": 3, "before": first["next"]}).json()
    assert [row["id"] for row in first["images"] + second["images"]] == wanted[::-1]
    assert second["next"] is None
    assert ann.get("/v1/images/index", params={"q": "plum"}).json() == {"ids": [newcomer, *wanted[::-1]], "count": 6}
    assert ids(ann.get("/v1/images", params={"ids": f"{wanted[1]},{wanted[0]}"})) == [wanted[1], wanted[0]]
    row = first["images"][0]
    assert (row["prompt"], row["kind"], row["seed"], row["width"], row["clip"]) == ("a plum 4", "image", 7, 64, None)
    assert {"fake"} <= set(ann.get("/v1/images/facets").json()["models"])


def test_files_and_settings_are_sent_to_stay(served, ann):
    number = record(served, "ann", "a fig", frames=9, fps=8.0)
    (served.out / "stray.mp4").write_bytes(b"x")
    row = ann.get(f"/v1/images/{number}").json()
    assert row["settings"]["prompt"] == "a fig"
    assert (row["seconds"], row["notes"], row["boards"]) == (1.5, ["a note"], [])
    name = row["name"]
    (served.out / name).with_suffix(".mp4").write_bytes(b"moving")
    sent = ann.get(row["url"])
    assert sent.content == (served.out / name).read_bytes()
    assert sent.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert ann.get(row["clip"]).content == b"moving"
    small = ann.get(row["thumbnail"])
    assert small.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(small.content)) as image:
        assert image.size == (64, 32)
    (served.out / name).unlink()
    for address in (row["url"], row["thumbnail"]):
        assert ann.get(address).json()["error"]["code"] == "gone"


def test_what_an_image_was_started_from_is_sent_while_it_is_kept(served, ann):
    name = served.engine.uploads.add(Image.new("RGB", (48, 48), (1, 2, 3)), "ann")
    row = ann.get(f"/v1/images/{record(served, 'ann', 'a start', image=name)}").json()
    with Image.open(io.BytesIO(ann.get(row["source"]).content)) as image:
        assert (image.size, image.getpixel((0, 0))) == ((48, 48), (1, 2, 3))
    number = record(served, "ann", "another", image="0" * 64)
    assert ann.get(f"/v1/images/{number}/source").status_code == 404


def test_deleted_images_come_back_and_the_trash_is_emptied(served, ann):
    one, two = record(served, "ann", "a pear"), record(served, "ann", "a pear")
    before = ann.get(f"/v1/images/{one}/file").content
    gone = ann.post("/v1/images/delete", json={"ids": [one, two, 10**9]}).json()
    assert sorted(gone["ids"]) == [one, two]
    assert ids(ann.get("/v1/images", params={"q": "pear"})) == []
    assert ann.get(f"/v1/images/{one}/file").status_code == 404
    assert ann.post("/v1/images/restore", json={"batch": gone["batch"]}).json()["ids"] == [two, one]
    assert ann.get(f"/v1/images/{one}/file").content == before
    gone = ann.delete(f"/v1/images/{two}").json()
    assert ann.get("/v1/images/facets").json()["deleted"] == 1
    assert ann.delete("/v1/trash").json() == {"count": 1}
    assert ann.post("/v1/images/restore", json={"batch": gone["batch"]}).status_code == 404


def test_favourites_and_boards(served, ann):
    one, two = record(served, "ann", "a kiwi"), record(served, "ann", "a kiwi")
    assert ann.post("/v1/images/favourite", json={"ids": [one]}).json() == {"ids": [one]}
    assert ids(ann.get("/v1/images", params={"favourites": True})) == [one]
    ann.post("/v1/images/favourite", json={"ids": [one], "favourite": False})
    assert ids(ann.get("/v1/images", params={"favourites": True})) == []
    made = ann.post("/v1/boards", json={"name": " green "})
    assert (made.status_code, made.json()["name"]) == (201, "green")
    board = made.json()["id"]
    assert ann.post("/v1/boards", json={"name": "green"}).status_code == 409
    assert ann.post(f"/v1/boards/{board}/images", json={"ids": [one, two]}).json() == {"ids": [one, two]}
    assert ids(ann.get("/v1/images", params={"board": board})) == [two, one]
    ann.post(f"/v1/boards/{board}/images/remove", json={"ids": [two]})
    assert ann.patch(f"/v1/boards/{board}", json={"name": "sour"}).status_code == 200
    assert ann.get("/v1/boards").json() == {"boards": [{"id": board, "name": "sour", "count": 1}]}
    assert ann.get(f"/v1/images/{one}").json()["boards"] == [board]
    assert ann.delete(f"/v1/boards/{board}").status_code == 200
    for answer in (ann.get("/v1/images", params={"board": board}), ann.delete(f"/v1/boards/{board}")):
        assert answer.status_code == 404


def test_an_archive_is_streamed(served, ann):
    numbers = [record(served, "ann", "a date") for _ in range(3)]
    answer = ann.get("/v1/images/archive", params={"ids": ",".join(map(str, numbers))})
    assert answer.headers["content-disposition"] == 'attachment; filename="tessera-images.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as packed:
        assert packed.testzip() is None
        assert all(packed.read(name) == (served.out / name).read_bytes() for name in packed.namelist())
        assert len(packed.namelist()) == 3
    assert ann.get("/v1/images/archive", params={"ids": str(10**9)}).status_code == 410


def test_nobody_meets_images_of_others(served, ann, bob):
    number = record(served, "ann", "a secret")
    board = ann.post("/v1/boards", json={"name": "mine"}).json()["id"]
    gone = ann.delete(f"/v1/images/{record(served, 'ann', 'a secret')}").json()
    assert ids(bob.get("/v1/images")) == []
    assert bob.get("/v1/images/index").json()["ids"] == []
    assert ids(bob.get("/v1/images", params={"ids": str(number)})) == []
    for part in ("", "/file", "/thumbnail", "/clip", "/source"):
        assert bob.get(f"/v1/images/{number}{part}").status_code == 404
    assert bob.get("/v1/images/archive", params={"ids": str(number)}).status_code == 410
    assert bob.post("/v1/images/delete", json={"ids": [number]}).json()["ids"] == []
    assert bob.delete(f"/v1/images/{number}").status_code == 404
    assert bob.post("/v1/images/favourite", json={"ids": [number]}).json() == {"ids": []}
    assert bob.post("/v1/images/restore", json={"batch": gone["batch"]}).status_code == 404
    assert bob.delete("/v1/trash").json() == {"count": 0}
    for answer in (
        bob.get("/v1/images", params={"board": board}),
        bob.post(f"/v1/boards/{board}/images", json={"ids": []}),
        bob.patch(f"/v1/boards/{board}", json={"name": "his"}),
        bob.delete(f"/v1/boards/{board}"),
    ):
        assert answer.status_code == 404
    assert ann.post("/v1/images/restore", json={"batch": gone["batch"]}).status_code == 200


def test_who_may_only_look_changes_nothing_and_nobody_gets_in_without_a_token(served):
    number = record(served, "eve", "hers")
    with client_of(served, headers=bearer(served, "eve")) as eve:
        assert ids(eve.get("/v1/images")) == [number]
        assert eve.get("/v1/images/facets").json()["may_change"] is False
        for answer in (
            eve.delete(f"/v1/images/{number}"),
            eve.delete("/v1/trash"),
            eve.post("/v1/images/favourite", json={"ids": [number]}),
            eve.post("/v1/boards", json={"name": "x"}),
        ):
            assert answer.status_code == 403
    with client_of(served) as stranger:
        for address in ("/v1/images", f"/v1/images/{number}/file", "/v1/boards", "/v1/images/archive?ids=1"):
            assert stranger.get(address).status_code == 401


def test_pages_of_other_sites_change_nothing(served, ann):
    number = record(served, "ann", "a lure")
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        assert ann.delete(f"/v1/images/{number}", headers=headers).status_code == 403
        assert ann.post("/v1/images/delete", json={"ids": [number]}, headers=headers).status_code == 403
        assert ann.get("/v1/images", headers=headers).status_code == 403
    assert ann.get(f"/v1/images/{number}").status_code == 200


@pytest.mark.parametrize(
    ("method", "address", "body"),
    [
        ("POST", "/v1/images/delete", {"ids": ["x"]}),
        ("POST", "/v1/images/delete", {"ids": [1], "more": 1}),
        ("POST", "/v1/images/delete", {"ids": [2**60]}),
        ("POST", "/v1/images/delete", []),
        ("POST", "/v1/images/restore", {"batch": "../x"}),
        ("POST", "/v1/boards", {"name": ""}),
        ("POST", "/v1/boards", {"name": "a\0b"}),
        ("POST", "/v1/boards", {"name": "x" * 81}),
        ("GET", "/v1/images?kind=film", None),
        ("GET", "/v1/images?since=nan", None),
        ("GET", "/v1/images?since=-1", None),
        ("GET", "/v1/images?limit=10000", None),
        ("GET", "/v1/images?board=0", None),
        ("GET", "/v1/images?ids=1,x", None),
        ("GET", "/v1/images?ids=", None),
        ("GET", "/v1/images/archive?ids=1;2", None),
        ("GET", f"/v1/images/{2**60}", None),
    ],
)
def test_what_is_wrong_is_said(ann, method, address, body):
    answer = ann.request(method, address, json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"]


def test_words_of_sql_are_words(served, ann):
    number = record(served, "ann", "100% _odd_ 'quote' \"double\"")
    for text in ("100%", "_odd_", "'quote'", '"double"', "% _"):
        assert ids(ann.get("/v1/images", params={"q": text})) == [number], text
    for text in ("' OR 1=1 --", '" OR "', "NEAR(odd)", "*", "\0", "\U0001f600" * 100):
        assert number not in ids(ann.get("/v1/images", params={"q": text})), text
