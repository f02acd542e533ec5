"""The page with users: nobody gets in without a token, and each sees only what is theirs."""

from __future__ import annotations

import asyncio
import html
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from apps.api.app import create_app
from apps.api.tokens import TokenTable, add_user
from apps.commands.serve import _start, check_port
from apps.service.engine import Engine
from apps.studio.app import build_page, mount
from apps.studio.generation_handlers import GenerationHandlers
from apps.studio.page_values import PageError
from apps.studio.sessions import Sessions
from tests.studio.fakes import FakePipeline
from tests.studio.serving import client_of, serving_page
from tests.studio.test_page import ENGLISH, PAGE, generate, pictures


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    (folder / "out").mkdir()
    tokens = {name: add_user(folder / "users.json", name, role) for name, role in
              (("ann", "generate"), ("bob", "generate"), ("eve", "view"), ("root", "admin"))}  # fmt: skip
    table = TokenTable(folder / "users.json")
    pipe = FakePipeline()
    engine = Engine({"fake": "x", "other": "y"}, folder / "out", device="cpu", load=lambda source: pipe)
    engine.model().result(10)
    app = create_app(engine, table)
    mount(app, engine, table)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    yield SimpleNamespace(
        address=f"http://127.0.0.1:{port}", tokens=tokens, table=table, engine=engine, folder=folder, pipe=pipe
    )
    server.should_exit = True
    engine.close()


def tab(name):
    return SimpleNamespace(session_hash=name, username=name)


def told_by(changes, elem_id):
    """Return what a listener said of a part of the page."""
    return next(value for part, value in changes.items() if part.elem_id == elem_id)


def test_users_paint_and_see_their_own(served):
    sessions = Sessions(served.table)
    generation = GenerationHandlers(served.engine, ENGLISH, sessions)
    studio = SimpleNamespace(generation=generation, sessions=sessions)
    mine = pictures(generate(studio, tab("ann")))[0]
    assert [job.owner for job in served.engine.jobs("ann")] == ["ann"]
    assert served.engine.history(sessions.viewer(tab("bob"))) == []
    for name in ("ann", "root"):
        assert served.engine.history(sessions.viewer(tab(name)))[0].name == mine.path.name
    assert served.engine.history(sessions.viewer(tab("a stranger"))) == []
    for name in ("eve", "a stranger"):
        refused = generation.generate(PAGE, tab(name))
        assert set(refused) == {"problem"}
        assert ENGLISH("no_rights") in refused["problem"]


def test_a_queue_is_changed_by_its_owner_only(served):
    """Whatever session a browser says it is: the user of the request counts, and a watcher changes nothing."""
    generation = GenerationHandlers(served.engine, ENGLISH, Sessions(served.table))
    served.pipe.step_seconds = 0.1
    generation.generate({**PAGE, "steps": 150}, tab("bob"))
    for seed in (50, 60):
        generation.generate({**PAGE, "seed": seed}, tab("bob"))
    running, *waiting = [job.id for job in served.engine.unfinished("bob")]
    assert served.pipe.in_step.wait(10)
    ways = [
        lambda who: generation.stop(who, running),
        lambda who: generation.skip(who, running),
        lambda who: generation.finish(who, running),
        lambda who: generation.move(who, waiting[1], -1),
        lambda who: generation.drop(who, waiting[0]),
        generation.clear,
    ]
    pretender = SimpleNamespace(session_hash="bob", username="ann")
    for way in ways:
        for name in ("eve", "a stranger"):
            with pytest.raises(PageError, match="no_rights"):
                way(tab(name))
        way(pretender)
    assert [job.id for job in served.engine.unfinished("bob")] == [running, *waiting]
    assert generation.move(tab("bob"), waiting[1], -1)["waiting"]["value"] == waiting[1]
    assert served.engine.waiting("bob") == [waiting[1], waiting[0]]
    generation.drop(tab("bob"), waiting[0])
    generation.clear(tab("bob"))
    generation.stop(SimpleNamespace(session_hash="another device", username="bob"), running)
    assert served.engine.stream(running).wait_closed(10)
    assert [served.engine.job(job).state for job in (running, *waiting)] == ["stopped"] * 3
    served.pipe.step_seconds = 0.0


def test_who_may_only_look_changes_nothing_through_the_page(served, tmp_path):
    """Every listener of the page is called as somebody who may look, with values that the others may send."""
    page = build_page(served.engine, ENGLISH, Sessions(served.table))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture.png")
    (tmp_path / "prompts.txt").write_text("a fox")
    given = {
        "take_source": "picture.png", "take_first_image": "picture.png", "take_last_image": "picture.png",
        "load_settings": "picture.png", "take_prompts": "prompts.txt",
    }  # fmt: skip
    problem = next(block for block in page.blocks.values() if block.elem_id == "problem")
    changing = (*given, "start_from", "inpaint_it", "animate_it", "settled", "stop", "clear",
                "stop_comparison")  # fmt: skip
    asked = [fn for fn in page.fns.values() if fn.name in changing]
    assert len(asked) == len(changing)
    for fn in asked:
        values: list[str | None] = [None] * len(fn.inputs)
        if fn.name in given:
            values[0] = str(tmp_path / given[fn.name])
        if fn.name == "settled":
            values = ["other", "text"]
        told = fn.fn(tab("eve"), *values)
        assert ENGLISH("no_rights") in told[problem], fn.name
    assert list((served.folder / "out" / ".tessera" / "uploads").iterdir()) == []
    assert served.engine.loaded("other") is None
    compared = next(fn for fn in page.fns.values() if fn.name == "compared")

    async def comparing() -> list[str]:
        return [str(told) async for told in compared.fn(tab("eve"), *[None] * len(compared.inputs))]

    (refusal,) = asyncio.run(comparing())
    assert html.escape(ENGLISH("no_rights")) in refusal or ENGLISH("no_rights") in refusal
    source = next(fn for fn in asked if fn.name == "take_source")
    assert told_by(source.fn(tab("ann"), str(tmp_path / "picture.png")), "source-view")


@pytest.mark.parametrize("name", ["ann", None])
def test_the_page_offers_to_sign_out_where_people_sign_in(tmp_path, name):
    with serving_page(tmp_path, with_users=name is not None) as served, client_of(served, name) as client:
        for address, label in (("/config", "Sign out"), ("/zh/config", "\u9000\u51fa\u767b\u5f55")):
            head = json.dumps(client.get(address).json(), ensure_ascii=False)
            assert (label in head) is (name is not None)
        if name is not None:
            client.get("/logout", headers={"Sec-Fetch-Site": "same-origin"})  # as a click on the link does
            assert client.get("/config").status_code == 401
