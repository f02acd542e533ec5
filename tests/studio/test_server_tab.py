"""The tab Server: only administrators see it, and what it shows is escaped and holds no prompts."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from types import SimpleNamespace

import gradio as gr
import pytest

from apps.api.tokens import TokenTable, add_user
from apps.service.accounting import Used
from apps.service.device_state import DeviceState
from apps.service.engine import Engine
from apps.service.quotas import Quotas
from apps.service.requests import TextToImageRequest
from apps.service.server_state import QueueRow
from apps.studio import server_views
from apps.studio.app import build_page
from apps.studio.page_values import PageError
from apps.studio.server_handlers import ServerHandlers
from apps.studio.sessions import Sessions
from apps.studio.strings import Strings, languages
from tests.studio.browsers import open_browser
from tests.studio.fakes import FakePipeline
from tests.studio.serving import ROLES, bearer, client_of, serving_page

ENGLISH = Strings("en")


def tab(name):
    return SimpleNamespace(session_hash=name, username=name)


def shows(update):
    return update["visible"]


@pytest.fixture
def server(tmp_path):
    """Yield handlers of a server with users, whose engine works on a job of ann's until it is stopped."""
    for name, role in ROLES.items():
        add_user(tmp_path / "users.json", name, role)
    table = TokenTable(tmp_path / "users.json")
    pipe = FakePipeline(0.05)
    engine = Engine({"fake": "x"}, None, device="cpu", load=lambda source: pipe)
    engine.model().result(60)
    with closing(engine):
        job = engine.submit(TextToImageRequest(prompt="my secret garden", steps=200), "ann")
        assert pipe.in_step.wait(30)
        yield SimpleNamespace(handlers=ServerHandlers(engine, ENGLISH, Sessions(table)), engine=engine, job=job)


def test_only_administrators_see_the_tab_and_every_listener_asks_again(server):
    handlers, told = server.handlers, f"{server.job} {time.time_ns() // 10**6}"
    for name in ("ann", "eve", "a stranger"):
        assert not shows(handlers.offer(tab(name)))
        for way in (handlers.open, handlers.tick, lambda who: handlers.stop_job(who, told)):
            with pytest.raises(PageError, match=r"server\.rights"):
                way(tab(name))
    assert server.engine.job(server.job).state == "running"
    assert shows(handlers.offer(tab("root")))


def test_an_administrator_sees_who_uses_the_server_and_stops_a_job(server, monkeypatch):
    handlers = server.handlers
    opened = handlers.open(tab("root"))
    assert opened["server_timer"]["active"]
    shown = "".join(opened[f"server_{name}"] for name in ("users", "queue", "devices"))
    assert "secret" not in shown
    assert f'data-job="{server.job}"' in shown
    assert all(name in opened["server_users"] for name in ROLES)
    assert "server_timer" not in handlers.tick(tab("root"))
    for told in ("", "x", f"{server.job}", f"{server.job}; 1", f"{'0' * 16} 5"):
        assert ENGLISH("server.gone") in handlers.stop_job(tab("root"), told)["server_problem"]
    said: list[str] = []
    monkeypatch.setattr(gr, "Info", said.append)
    handlers.stop_job(tab("root"), f"{server.job} 5")
    assert server.engine.stream(server.job).wait_closed(30)
    assert said == [ENGLISH("server.stopped")]
    assert server.engine.job(server.job).state == "stopped"
    assert ENGLISH("server.gone") in handlers.stop_job(tab("root"), f"{server.job} 6")["server_problem"]
    assert ENGLISH("server.empty") in handlers.tick(tab("root"))["server_queue"]


def test_everybody_on_a_server_without_users_sees_the_tab():
    with closing(Engine({"fake": "x"}, None, device="cpu", load=lambda source: FakePipeline())) as engine:
        handlers = ServerHandlers(engine, ENGLISH, Sessions(None))
        assert shows(handlers.offer(tab(None)))
        assert ENGLISH("server.local") in handlers.open(tab(None))["server_users"]


@pytest.mark.parametrize("language", languages())
def test_what_is_shown_is_escaped(language):
    words, bad = Strings(language), "<b>x</b>\"'"
    job = QueueRow("0" * 16, bad, bad, "text_to_image", "queued", 3, 100.0, None, 1, 4)
    quotas = Quotas(images_per_day=5, seconds_per_day=60.5, queued_jobs=2, storage_mb=1.5)
    device = DeviceState("cuda:0", bad, 4 * 2**30, 2**30, {bad: True, "other": False})
    drawn = [
        server_views.queue([job], 3_900.0, words),
        server_views.users(
            [(bad, "view", quotas, Used(2, 10.2, 1, 1, 0, 600_000)), (bad, None, Quotas(), Used())], words
        ),
        server_views.devices([device], words),
    ]
    for one in drawn:
        assert "<b>x" not in one
        assert "&lt;b&gt;x" in one
        assert "x</b>\"'" not in one
    assert words("server.hours", hours=1, minutes=3) in drawn[0]
    assert all(words("server.of", used=used, most=most) in drawn[1] for used, most in ((2, 5), (11, "60.5")))
    assert words("server.megabytes.most", used="0.6", most="1.5") in drawn[1]
    assert 'style="width:75.0%"' in drawn[2]
    assert server_views.duration(59.9, words) == words("server.seconds", seconds=59)
    assert server_views.duration(125, words) == words("server.minutes", minutes=2)


def test_the_tab_is_hidden_until_a_listener_has_asked_who_looks(tmp_path):
    add_user(tmp_path / "users.json", "ann")
    with closing(Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: FakePipeline())) as engine:
        for table, is_shown in ((TokenTable(tmp_path / "users.json"), False), (None, True)):
            page = build_page(engine, ENGLISH, Sessions(table))
            (one,) = [block for block in page.blocks.values() if block.elem_id == "tab-server"]
            assert one.visible is is_shown


@pytest.mark.browser
def test_an_administrator_stops_a_job_in_a_browser(tmp_path):
    ask, pipe, end = {"task": "text_to_image", "prompt": "a fox", "steps": 3}, FakePipeline(), threading.Event()
    pipe.at_step = lambda step: step == 0 or end.wait(120)
    with serving_page(tmp_path, pipe) as served, open_browser() as browser, client_of(served, "root") as client:
        jobs = [client.post("/v1/jobs", json=ask, headers=bearer(served, name)).json()["id"] for name in ("ann", "bob")]
        context = browser.new_context(viewport={"width": 390, "height": 800})
        context.add_cookies(
            [{"name": one.name, "value": one.value, "url": served.address} for one in client.cookies.jar]
        )
        page = context.new_page()
        page.goto(served.address)
        page.get_by_role("tab", name="Server", exact=True).click()
        page.get_by_role("button", name="Stop the request of bob").click()
        page.wait_for_selector("#server-queue tbody tr:nth-child(2)", state="detached")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert [served.engine.job(job).state for job in jobs] == ["running", "stopped"]
        end.set()
