"""Servers of fakes for tests over real sockets: the page and the API, with users or without."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
from PIL import Image

from apps.api.app import create_app
from apps.api.tokens import TokenTable, add_user
from apps.commands.serve import _start, check_port
from apps.service.engine import Engine
from apps.service.limits import ServerLimits
from apps.service.own_models import OwnModels
from apps.studio.app import FORMS, UPLOADS, mount
from tests.studio.fakes import FakePipeline

ROLES = {"ann": "generate", "bob": "generate", "eve": "view", "root": "admin"}


@contextmanager
def serving_page(folder, pipe=None, *, with_users=True, out="out", sizes=None, **limits):
    """Serve page and API; yields address, port, engine, output folder, tokens and their table."""
    (folder / out).mkdir()
    tokens = {name: add_user(folder / "users.json", name, role) for name, role in ROLES.items()} if with_users else {}
    table = TokenTable(folder / "users.json") if with_users else None
    engine = Engine({"fake": "x"}, folder / out, device="cpu", load=lambda source: pipe or FakePipeline(0.005),
                    server_limits=ServerLimits(**limits))  # fmt: skip
    engine.model().result(10)
    app = create_app(engine, table, uploads=UPLOADS, forms=FORMS, sizes=sizes)
    app.state.own_models = own = OwnModels(engine, folder / "models", hub=NoHub())
    mount(app, engine, table, own=own)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    try:
        yield SimpleNamespace(
            address=f"http://127.0.0.1:{port}", port=port, engine=engine, out=folder / out, tokens=tokens,
            users=folder / "users.json", app=app, server=server,
        )  # fmt: skip
    finally:
        server.should_exit = True
        own.close()
        engine.close()


class NoHub:
    """A Hub that can't be reached."""

    def files(self, repository, revision):
        raise ConnectionError("The Hub can't be reached.")


@contextmanager
def client_of(served, name=None, **more):
    """Yield a client that has signed in on the page as a user; as nobody without a name."""
    with httpx.Client(base_url=served.address, trust_env=False, timeout=30, **more) as client:
        if name is not None:
            answer = client.post("/login", data={"username": name, "password": served.tokens[name]})
            assert answer.status_code == 303, answer.text
        yield client


def bearer(served, name):
    return {"Authorization": f"Bearer {served.tokens[name]}"}


def pages_of(app):
    """Return the Gradio pages of a server by the prefix of their addresses."""
    mounts = [route for route in app.router.routes if hasattr(route, "app") and hasattr(route.app, "app")]
    return {route.path: route.app.app.get_blocks() for route in mounts}


def raw(served, head, body=b"", seconds=10):
    """Send bytes as they are and return what comes back until the connection ends or nothing comes."""
    with socket.create_connection(("127.0.0.1", served.port), seconds) as one:
        one.sendall(head.encode() + body)
        answer = b""
        try:
            while part := one.recv(65_536):
                answer += part
        except TimeoutError:
            pass
    return answer


def png(folder, color=(200, 30, 30), size=(64, 64), name="picture.png"):
    Image.new("RGB", size, color).save(folder / name)
    return folder / name
