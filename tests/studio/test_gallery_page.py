"""The gallery of the page: its routes show nobody's images but one's own, and what its script does in a browser."""

from __future__ import annotations

import io
import zipfile

import pytest
from PIL import Image

from apps.service.requests import TextToImageRequest
from tests.studio.serving import client_of, serving_page
from tests.studio.test_server import browser

__all__ = ["browser"]
FOREIGN = {"origin": "http://evil.example", "sec-fetch-site": "cross-site"}


def generate(served, owner, prompt, count=1):
    asked = TextToImageRequest(prompt=prompt, steps=2, width=64, height=64, num_images=count, seed=1)
    assert list(served.engine.generate(asked, owner=owner))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving_page(tmp_path_factory.mktemp("users")) as found:
        generate(found, "ann", "a red apple", 2)
        generate(found, "bob", "a blue whale")
        yield found


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    with serving_page(tmp_path_factory.mktemp("local"), with_users=False) as found:
        generate(found, "local", "a red apple", 3)
        generate(found, "local", "a fox")
        yield found


def numbers_of(client, **asked):
    return client.get("/gallery/items", params=asked).json()["numbers"]


def test_everybody_sees_their_own_and_administrators_all(served):
    with client_of(served, "ann") as ann, client_of(served, "bob") as bob, client_of(served, "root") as root:
        assert len(numbers_of(ann)) == 2
        assert len(numbers_of(bob)) == 1
        assert len(numbers_of(root)) == 3
        assert numbers_of(ann, text="whale") == []
        (whale,) = numbers_of(bob)
        for path in ("thumbnail", "file", "settings"):
            assert bob.get(f"/gallery/{path}/{whale}").status_code == 200
            assert ann.get(f"/gallery/{path}/{whale}").status_code == 404
        assert ann.get("/gallery/rows", params={"numbers": str(whale)}).json() == []
        assert ann.post("/gallery/mark", json={"numbers": [whale], "favourite": True}).json() == {"numbers": []}
        assert ann.post("/gallery/delete", json={"numbers": [whale]}).json()["numbers"] == []
        assert ann.post("/gallery/zip", data={"numbers": str(whale)}).status_code == 422
        assert numbers_of(bob) == [whale]
        row = bob.get("/gallery/rows", params={"numbers": str(whale)}).json()[0]
        assert row["text"] == "a blue whale"
        assert not {"name", "owner", "job"} & row.keys()


def test_who_is_nobody_and_who_may_only_look(served):
    with client_of(served) as nobody, client_of(served, "eve") as eve:
        assert nobody.get("/gallery/items").status_code in (303, 401)
        assert numbers_of(eve) == []
        for path, body in (("mark", {"numbers": [1], "favourite": True}), ("delete", {"numbers": [1]}),
                           ("restore", {"batch": "0" * 16}), ("board", {"numbers": [1], "name": "x"})):  # fmt: skip
            assert eve.post(f"/gallery/{path}", json=body).status_code == 403


def test_changes_from_pages_of_others_are_refused(served):
    with client_of(served, "ann") as ann:
        first = numbers_of(ann)[0]
        for path in ("mark", "delete", "zip"):
            answer = ann.post(f"/gallery/{path}", json={"numbers": [first], "favourite": True}, headers=FOREIGN)
            assert answer.status_code == 403
        assert first in numbers_of(ann)


@pytest.mark.parametrize("path", ["file/-1", "file/x", "file/99999999999999999999", "rows?numbers=" + "1," * 5000,
                                  "items?kind=x", "items?board=77", "thumbnail/0"])  # fmt: skip
def test_what_is_out_of_range_is_refused(served, path):
    with client_of(served, "ann") as ann:
        assert ann.get(f"/gallery/{path}").status_code in (404, 422)


def test_images_are_marked_packed_deleted_and_come_back(served):
    with client_of(served, "ann") as ann:
        first, second = numbers_of(ann)
        before = ann.get(f"/gallery/file/{first}").content
        assert ann.post("/gallery/mark", json={"numbers": [first], "favourite": True}).json() == {"numbers": [first]}
        assert numbers_of(ann, favourites=True) == [first]
        packed = ann.post("/gallery/zip", data={"numbers": f"{first},{second}"})
        with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
            assert len(archive.namelist()) == 2
            assert not any(name.startswith(("/", "..")) for name in archive.namelist())
        gone = ann.post("/gallery/delete", json={"numbers": [first]}).json()
        assert numbers_of(ann) == [second]
        assert ann.get(f"/gallery/file/{first}").status_code == 404
        assert ann.post("/gallery/restore", json={"batch": gone["batch"]}).json() == {"numbers": [first]}
        assert ann.get(f"/gallery/file/{first}").content == before
        small = Image.open(io.BytesIO(ann.get(f"/gallery/thumbnail/{first}").content))
        assert small.format == "WEBP"
        put = ann.post("/gallery/board", json={"numbers": [first], "name": "best"}).json()
        assert numbers_of(ann, board=put["board"]) == [first]


def opened(browser, served):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    page.goto(served.address)
    page.wait_for_selector("#generate:not([disabled])")
    page.get_by_role("tab", name="Gallery").click()
    page.locator(".gallery-cell").first.wait_for()
    return page


def note_says(page, text):
    page.wait_for_function("text => document.querySelector('.gallery-note').textContent.startsWith(text)", arg=text)


def test_search_select_delete_undo_and_view_by_keyboard(browser, local):
    page = opened(browser, local)
    note_says(page, "4 items")
    page.fill(".gallery-bar input[type=search]", "apple")
    note_says(page, "3 items")
    page.locator(".gallery-cell").first.click()
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    note_says(page, "2 selected")
    page.keyboard.press("f")
    page.wait_for_function("document.querySelectorAll('.gallery-cell .star').length === 2")
    page.keyboard.press("Enter")
    page.locator(".gallery-view img").wait_for()
    page.locator(".gallery-view td", has_text="a red apple").first.wait_for()
    page.keyboard.press("+")
    assert "scale" in page.locator(".gallery-frame img").get_attribute("style")
    page.keyboard.press("Escape")
    page.locator(".gallery-view").wait_for(state="detached")
    page.get_by_role("button", name="Compare settings").click()
    page.locator(".gallery-view tr.differs th", has_text="seed").wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete", exact=True).click()
    note_says(page, "2 deleted.")
    assert page.locator(".gallery-cell").count() == 1
    page.get_by_role("button", name="Undo").click()
    note_says(page, "2 restored.")
    page.locator(".gallery-cell").first.dblclick()
    page.get_by_role("button", name="Show on the stage").click()
    page.wait_for_function("document.querySelector('#details').textContent.includes('seed')")
    page.close()


def test_of_ten_thousand_images_few_are_in_the_document(browser, local):
    page, asked = opened(browser, local), []
    page.on("request", lambda request: asked.append(request.url) if "/gallery/rows" in request.url else None)
    page.evaluate("""() => {  // as many numbers as a large gallery has, of the images that there are
      const fetched = window.fetch;
      window.fetch = async (url, given) => {
        const answer = await fetched(url, given);
        if (!String(url).includes("/gallery/items")) return answer;
        const found = await answer.json();
        found.numbers = Array.from({ length: 10000 }, (_, i) => 20000 - i);
        return new Response(JSON.stringify(found));
      };
      window.tesseraGallery.open();
    }""")
    note_says(page, "10000 items")
    stall = page.evaluate("""async () => {
      const scroll = document.querySelector(".gallery-scroll"), end = scroll.scrollHeight;
      let worst = 0, most = 0, last = performance.now();
      for (let i = 1; i <= 60; i++) {
        scroll.scrollTop = end * i / 60;
        await new Promise((done) => requestAnimationFrame(done));
        const now = performance.now();
        worst = Math.max(worst, now - last);
        last = now;
        most = Math.max(most, document.querySelectorAll(".gallery-cell").length);
      }
      return [worst, most];
    }""")
    assert stall[1] < 150  # cells, of 10,000 images
    assert page.evaluate("document.querySelector('.gallery-scroll').scrollTop") > 100_000
    assert len(asked) < 200
    page.close()
