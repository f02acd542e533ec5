"""The page with users: nobody gets in without a token, and each sees only what is theirs."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
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


@pytest.mark.parametrize("prefix", ["", "/zh"])
def test_the_page_asks_for_a_token(served, prefix):
    painted = served.folder / "out" / "secret.png"
    painted.write_bytes(b"x")
    with httpx.Client(base_url=served.address, trust_env=False, follow_redirects=True) as client:
        assert '"auth_required":true' in client.get(f"{prefix}/").text.replace(" ", "")
        for path in (
            "/config",
            "/gradio_api/info",
            f"/gradio_api/file={painted}",
            "/gradio_api/queue/data?session_hash=x",
        ):
            assert client.get(prefix + path).status_code in (401, 403), path
        for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/run/predict"):
            assert client.post(prefix + path, json={"data": [], "fn_index": 0}).status_code in (401, 403), path
        for name, token in (
            ("ann", "wrong"),
            ("ann", served.tokens["bob"]),
            ("nobody", served.tokens["ann"]),
            ("ann", ""),
        ):
            answer = client.post(f"{prefix}/login", data={"username": name, "password": token})
            assert answer.status_code in (400, 401, 422), name
        assert client.get(f"{prefix}/config").status_code == 401
        right = client.post(f"{prefix}/login", data={"username": "ann", "password": served.tokens["ann"]})
        assert right.status_code == 200
        assert client.get(f"{prefix}/config").status_code == 200
        assert client.get(f"{prefix}/gradio_api/file={painted}").status_code == 200
        state = served.folder / "out" / ".tessera" / "jobs.sqlite"
        assert client.get(f"{prefix}/gradio_api/file={state}").status_code == 403


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
