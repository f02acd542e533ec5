"""The page with users: nobody gets in without a token, and each sees only what is theirs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from apps.api.app import create_app
from apps.api.tokens import TokenTable, add_user
from apps.engine import Engine
from apps.serve import _start, check_port
from apps.studio.app import mount
from apps.studio.painting import Painting
from apps.studio.sessions import Sessions
from apps.studio.strings import Strings
from tests.studio.fakes import FakePipeline
from tests.studio.test_page import ENGLISH, PAGE, pictures


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    (folder / "out").mkdir()
    tokens = {name: add_user(folder / "users.json", name, role) for name, role in
              (("ann", "paint"), ("bob", "paint"), ("eve", "watch"), ("root", "admin"))}  # fmt: skip
    table = TokenTable(folder / "users.json")
    engine = Engine({"fake": "x"}, folder / "out", device="cpu", load=lambda source: FakePipeline())
    engine.model().result(60)
    app = create_app(engine, table)
    mount(app, engine, table)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    yield SimpleNamespace(address=f"http://127.0.0.1:{port}", tokens=tokens, table=table, engine=engine, folder=folder)
    server.should_exit = True
    engine.close()


def test_users_paint_and_see_their_own(served):
    sessions = Sessions(served.table)
    painting = Painting(served.engine, ENGLISH, sessions)

    def tab(name):
        return SimpleNamespace(session_hash=name, username=name)

    mine = pictures(list(painting.paint([], PAGE, tab("ann"))))[0]
    assert [job.owner for job in served.engine.jobs("ann")] == ["ann"]
    assert served.engine.history(sessions.watcher(tab("bob"))) == []
    for name in ("ann", "root"):
        assert served.engine.history(sessions.watcher(tab(name)))[0].name == mine.path.name
    assert served.engine.history(sessions.watcher(tab("a stranger"))) == []
    for name in ("eve", "a stranger"):
        (refused,) = painting.paint([], PAGE, tab(name))
        assert Strings("en")("no_rights") in refused["stage"]
