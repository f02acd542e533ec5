"""The page as an app on a phone: manifest, icons, worker, and the page that is shown without a server."""

from __future__ import annotations

import io
import json
import re

import httpx
import pytest
from PIL import Image

from apps.api.app import create_app
from apps.api.tokens import TokenTable, add_user
from apps.commands.serve import _start, check_port
from apps.service.engine import Engine
from apps.studio import pwa, theme
from apps.studio.app import FORMS, UPLOADS, mount
from apps.studio.strings import Strings
from tests.studio.browsers import only_chromium
from tests.studio.fakes import FakePipeline
from tests.studio.serving import serving_page
from tests.studio.test_server import browser, note_says

__all__ = ["browser"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    with serving_page(tmp_path_factory.mktemp("app"), with_users=False) as served:
        yield served


def get(served, path, **more):
    return httpx.get(f"{served.address}{path}", trust_env=False, **more)


@pytest.mark.parametrize(
    ("path", "language", "start"), [("/manifest.json", "en", "/"), ("/zh/manifest.json", "zh", "/zh/")]
)
def test_the_manifest_is_whole_in_each_language(local, path, language, start):
    answer = get(local, path)
    assert answer.headers["content-type"] == "application/manifest+json"
    told, words = answer.json(), Strings(language)
    assert (told["name"], told["short_name"]) == (words("app.name"), words("app.short_name"))
    assert told["description"] == words("app.description")
    assert (told["lang"], told["start_url"], told["scope"], told["display"]) == (language, start, "/", "standalone")
    assert told["background_color"] == told["theme_color"] == theme.PAPER
    assert get(local, start).status_code == 200
    found = {(icon["purpose"], icon["sizes"]) for icon in told["icons"]}
    assert found == {(purpose, size) for purpose in ("any", "maskable") for size in ("192x192", "512x512")}
    for icon in told["icons"]:
        served = get(local, icon["src"])
        assert served.headers["content-type"] == icon["type"] == "image/png"
        with Image.open(io.BytesIO(served.content), formats=["PNG"]) as image:
            assert f"{image.width}x{image.height}" == icon["sizes"]


def test_icons_show_the_logo_where_every_phone_shows_it(local):
    for path, icon in pwa.ICONS.items():
        with Image.open(io.BytesIO(get(local, path).content)) as image:
            shown, side = image.convert("RGBA"), icon.side
        near, far = (round(side * (0.5 + sign * icon.share / 4)) for sign in (-1, 1))  # the middles of the four tiles
        tiles = [shown.getpixel((x, y)) for y in (near, far) for x in (near, far)]
        assert [f"#{r:02x}{g:02x}{b:02x}" for r, g, b, _ in tiles] == ["#d9603a", "#e9b44c", "#2f7f79", "#41507f"]
        corner = shown.getpixel((0, 0))
        assert corner == ((*bytes.fromhex(theme.PAPER[1:]), 255) if icon.paper else (0, 0, 0, 0)), path
        if icon.purpose == "maskable":  # nothing of the logo is beyond the circle that is always seen
            assert icon.share * 2**0.5 <= 0.8


def test_the_files_are_of_this_version_and_have_the_headers_of_all_others(local):
    code = get(local, "/worker.js")
    assert code.headers["content-type"].startswith("text/javascript")
    assert code.headers["cache-control"] == "no-cache"
    assert code.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert code.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in code.headers
    assert not re.search(r"@[A-Z_]+@", code.text + get(local, "/offline.html").text)
    unchanged = get(local, "/worker.js", headers={"If-None-Match": code.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    name = re.search(r'NAME = "(tessera-[^"]+)"', code.text)
    assert name is not None
    pwa.offline_page.cache_clear()
    pwa.worker.cache_clear()
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("gradio.__version__", "6.99.0")
        assert name[1] not in pwa.worker(False).decode()  # with another Gradio the old files go
    pwa.worker.cache_clear()


def test_users_need_no_token_for_it_and_keep_only_the_page_without_a_server(tmp_path):
    (tmp_path / "out").mkdir()
    token = add_user(tmp_path / "users.json", "ann", "generate")
    table = TokenTable(tmp_path / "users.json")
    engine = Engine({"fake": "x"}, tmp_path / "out", device="cpu", load=lambda source: FakePipeline())
    app = create_app(engine, table, uploads=UPLOADS, forms=FORMS, public=pwa.PUBLIC)
    mount(app, engine, table)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for path in pwa.PUBLIC:
                assert client.get(path).status_code == 200, path
                assert client.get(path, headers={"Origin": "http://evil.example"}).status_code == 403, path
            for path in ("/", "/config", "/outputs/x.png", "/assets/x.js", "/zh/config", "/worker.js/", "/icon-1.png"):
                assert client.get(path).status_code == 401, path
            assert "KEEPS_ASSETS = false" in client.get("/worker.js").text
            signed_in = client.get("/manifest.json", headers={"Authorization": f"Bearer {token}"})
            assert "set-cookie" not in signed_in.headers
            assert signed_in.json() == pwa.manifest("en")  # the same for everybody
    finally:
        server.should_exit = True
        engine.close()


IN_CACHES = """async () => {
  const found = {};
  for (const name of await caches.keys())
    found[name] = (await (await caches.open(name)).keys()).map((one) => new URL(one.url).pathname);
  return found;
}"""
ALLOWED = re.compile(r"/offline\.html|(/zh)?/assets/[\w.-]+-[\w-]{8}\.(js|css)")


@only_chromium
@pytest.mark.browser
def test_a_phone_installs_it_keeps_nothing_private_and_says_that_the_server_is_gone(local, browser):
    context = browser.new_context(viewport={"width": 390, "height": 844}, locale="zh-CN")
    page = context.new_page()
    page.set_default_timeout(60_000)
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    devtools = context.new_cdp_session(page)
    page.goto(f"{local.address}/zh/")
    page.wait_for_function("navigator.serviceWorker.controller !== null")
    assert page.evaluate("navigator.serviceWorker.ready.then((one) => new URL(one.scope).pathname)") == "/"
    told = devtools.send("Page.getAppManifest")
    assert told["url"].endswith("/zh/manifest.json")
    assert told["errors"] == []
    assert json.loads(told["data"])["name"] == Strings("zh")("app.name")
    hindrances = devtools.send("Page.getInstallabilityErrors")["installabilityErrors"]
    assert [one["errorId"] for one in hindrances] == ["in-incognito"]  # as every context of a test is
    assert "viewport-fit=cover" in page.get_attribute("meta[name=viewport]", "content")
    assert page.get_attribute("link[rel=apple-touch-icon]", "href") == "/apple-touch-icon.png"
    page.click(".night")
    colours = "[...document.querySelectorAll('meta[name=theme-color]')].map((one) => one.content)"
    page.wait_for_function(f"{colours}.every((one) => one === '{theme.NIGHT}')")
    assert page.locator("meta[name=theme-color]").count() == 2
    assert errors == []

    page.route("http://other.example/", lambda route: route.fulfill(body=f'<a href="{local.address}/zh/">here</a>'))
    page.goto("http://other.example/")
    with page.expect_navigation() as followed:  # from now on everything passes the worker
        page.click("a")
    assert followed.value.status == 200  # the worker has not made another request of a link than the guard lets in
    page.wait_for_function("[...document.querySelectorAll('.chip')].some(chip => chip.textContent.trim())")
    errors.clear()  # of requests of the page that was left
    page.fill("#prompt textarea", "a ghost")
    page.click("#generate")
    note_says(page, Strings("zh")("done", seconds="").strip(" s")[:2])
    kept = page.evaluate(IN_CACHES)
    (name,) = kept
    assert name in pwa.worker(False).decode()
    assert "/offline.html" in kept[name]
    assert len(kept[name]) > 1
    assert [path for path in kept[name] if not ALLOWED.fullmatch(path)] == []
    assert errors == []

    context.set_offline(True)
    page.goto(f"{local.address}/", wait_until="load")
    assert page.inner_text("main:not([hidden]) h1") == Strings("zh")("app.offline")
    assert page.evaluate("document.documentElement.lang") == "zh"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.set_offline(False)
    page.get_by_role("button", name=Strings("zh")("app.retry")).click()
    page.wait_for_selector("#generate")
    context.close()
