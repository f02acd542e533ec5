"""What every request passes, over raw HTTP: origins, users, bodies, connections, and sessions that end."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time

import httpx
import pytest

from apps.api import connections, logins, tokens
from apps.api.guards import BodyLimits
from apps.api.tokens import TokenTable, add_user
from tests.studio.fakes import FakePipeline
from tests.studio.serving import bearer, client_of, png, raw, serving_page

PATHS = ["/", "/config", "/zh/", "/gradio_api/token", "/gradio_api/queue/data?session_hash=x", "/v1/health",
         "/v1/models", "/theme.css", "/outputs/x.png"]  # fmt: skip
POSTS = ["/gradio_api/upload", "/gradio_api/queue/join", "/gradio_api/cancel", "/v1/jobs", "/v1/pictures"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Serve without users, as `tessera studio` does."""
    with serving_page(tmp_path_factory.mktemp("local"), with_users=False) as served:
        yield served


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    with serving_page(tmp_path_factory.mktemp("users")) as served:
        yield served


def foreign(served):
    """Headers that browsers send for pages of other origins; another port is another origin."""
    return [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{served.port + 1}"},
        {"Origin": f"http://localhost:{served.port}"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ]


@pytest.mark.parametrize("number", range(7))
def test_pages_of_other_origins_get_nothing_from_any_path(local, users, number):
    for served, name in ((local, None), (users, "ann")):
        with client_of(served, name) as client:
            for path in PATHS:
                answer = client.get(path, headers=foreign(served)[number])
                assert answer.status_code == 403, path
                assert not [header for header in answer.headers if header.startswith("access-control")], path
            for path in (
                "/gradio_api/upload",
                "/gradio_api/queue/join",
                "/gradio_api/cancel",
                "/v1/jobs",
                "/v1/pictures",
            ):
                assert client.post(path, headers=foreign(served)[number], json={}).status_code == 403, path
            for path in ("/", "/gradio_api/upload", "/v1/jobs"):
                ask = {**foreign(served)[number], "Access-Control-Request-Method": "POST"}
                assert client.options(path, headers=ask).status_code == 403, path


def test_our_own_page_and_links_to_it_pass(local):
    with client_of(local) as client:
        own = {"Origin": local.address, "Sec-Fetch-Site": "same-origin"}
        assert client.get("/config", headers=own).status_code == 200
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        answer = client.get("/", headers=link)
        assert answer.status_code == 200
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert not [name for name in client.get("/", headers=own).headers if name.startswith("access-control")]


def test_the_cookie_stays_on_this_site_and_out_of_scripts(users):
    with client_of(users) as client:
        answer = client.post("/login", data={"username": "ann", "password": users.tokens["ann"]})
        cookies = answer.headers.get_list("set-cookie")
        assert len(cookies) == 1
        assert {"httponly", "samesite=lax"} <= {part.strip().lower() for part in cookies[0].split(";")}
        assert users.tokens["ann"] not in cookies[0]


# ------------------------------------------------------------------------------- users


def test_nothing_is_served_to_strangers(users):
    with client_of(users) as client:
        for path in PATHS:
            answer = client.get(path, headers={"Accept": "application/json"})
            assert answer.status_code == (200 if path == "/v1/health" else 401), path
        for method, path in itertools.product(
            ("POST", "PUT", "DELETE", "PATCH"),
            ("/gradio_api/heartbeat/abc", "/gradio_api/cancel", "/gradio_api/queue/join", "/gradio_api/upload",
             "/gradio_api/vibe-code", "/gradio_api/reset", "/v1/jobs", "/gradio_api/call/x", "/anything"),
        ):  # fmt: skip
            assert client.request(method, path, json={}).status_code == 401, (method, path)
        sent = client.get("/", headers={"Accept": "text/html"})
        assert (sent.status_code, sent.headers["location"]) == (303, "/login")
        assert "password" in client.get("/login").text
        assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 401
        assert "problems" not in client.get("/v1/health").json()


def test_a_body_is_not_read_before_the_user_is_known(users):
    for path in ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/vibe-code", "/v1/jobs", "/v1/pictures"):
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{users.port}\r\nContent-Length: 600000000\r\n\r\n"
        answer = raw(users, head)  # nothing of the body is ever sent
        assert answer.startswith(b"HTTP/1.1 401"), path
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("origins", [["http://["], ["ftp://{own}"], ["", ""], ["http://{own}", "http://evil.example"]])
def test_origins_that_no_page_of_ours_has_are_refused(local, origins):
    own = f"127.0.0.1:{local.port}"
    lines = "".join(f"Origin: {one.format(own=own)}\r\n" for one in origins)
    answer = raw(local, f"GET /config HTTP/1.1\r\nHost: {own}\r\nConnection: close\r\n{lines}\r\n")
    assert answer.startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    ("body", "status"),
    [("&".join(f"a{i}=1" for i in range(20)), 422), ("username=ann&password=" + "x" * 9_000, 413), ("", 401)],
)
def test_the_login_form_is_refused_in_words(users, body, status):
    with client_of(users) as client:
        answer = client.post("/login", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert answer.status_code == status


def test_tokens_of_any_length_are_not_hashed(users, monkeypatch):
    hashed = []
    monkeypatch.setattr(tokens, "_digest", lambda salt, token: hashed.append(len(token)) or "")
    with client_of(users) as client:
        assert client.get("/v1/models", headers={"Authorization": "Bearer " + "x" * 20_000}).status_code == 401
        assert not hashed
        assert client.get("/v1/models", headers={"Authorization": "Bearer xyz"}).status_code == 401
        assert set(hashed) == {3}


@pytest.mark.parametrize("path", ["/login", "/gradio_api/queue/join", "/v1/jobs", "/gradio_api/cancel", "/v1/pictures",
                                  "/gradio_api/upload", "/zh/gradio_api/upload"])  # fmt: skip
def test_bodies_are_limited_with_a_length_and_without(users, path):
    def parts():
        for _ in range(30):
            yield b"x" * 1_000_000

    with client_of(users, "ann") as client:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{users.port}\r\nCookie: tessera-session="
        head += client.cookies["tessera-session"] + "\r\nContent-Length: 600000000\r\n\r\n"
        assert raw(users, head).startswith(b"HTTP/1.1 413")
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        try:
            status = client.post(path, content=parts(), headers=form).status_code
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):  # cut off while it was sending
            status = 413
        assert status in (400, 413, 422)
        assert client.get("/v1/models").status_code == 200


def test_revoked_and_renewed_tokens_end_sessions_and_open_streams(tmp_path):
    with serving_page(tmp_path, FakePipeline(0.05)) as served, client_of(served, "ann") as client:
        assert client.get("/v1/models").status_code == 200
        job = client.post("/v1/jobs", json={"task": "text_to_image", "prompt": "x", "steps": 200}).json()["id"]
        begun, ended = threading.Barrier(3), {}

        def follow(path):
            with client_of(served) as other, other.stream("GET", path, headers={"Cookie": cookie}) as answer:
                begun.wait(30)
                try:
                    ended[path] = (answer.status_code, sum(1 for _ in answer.iter_lines()))
                except httpx.RemoteProtocolError:
                    ended[path] = (answer.status_code, -1)

        cookie = f"tessera-session={client.cookies['tessera-session']}"
        paths = [f"/v1/jobs/{job}/events", "/gradio_api/heartbeat/abc"]
        readers = [threading.Thread(target=follow, args=(path,)) for path in paths]
        for reader in readers:
            reader.start()
        begun.wait(30)
        add_user(served.users, "ann", "generate")  # a new token: the old one and all that hangs on it ends
        assert client.get("/v1/models").status_code == 401
        assert client.get("/config").status_code == 401
        for reader in readers:
            reader.join(30)
        assert [ended[path][0] for path in paths] == [200, 200]
        assert served.engine.job(job).state == "running"  # the streams ended, not the job
        served.engine.stop(job)


def test_signing_out_ends_the_session(users):
    with client_of(users, "bob") as client:
        cookie = {"Cookie": f"tessera-session={client.cookies['tessera-session']}"}
        assert client.get("/config").status_code == 200
        assert client.get("/logout").status_code == 303
    with client_of(users) as other:
        assert other.get("/config", headers=cookie).status_code == 401


def test_a_link_on_another_page_signs_nobody_out(users):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    with client_of(users, "bob") as client:
        asked = client.get("/logout", headers={**link, "Accept-Language": "zh-CN"})
        assert asked.status_code == 200
        assert 'action="/logout"' in asked.text
        assert client.post("/logout", headers={**link, "Origin": "https://evil.example"}).status_code == 403
        assert client.get("/config").status_code == 200
        assert client.post("/logout", headers={"Origin": users.address}).status_code == 303
        assert client.get("/config").status_code == 401


def test_signing_in_again_ends_what_was_before(users):
    with client_of(users, "ann") as client:
        before = {"Cookie": f"tessera-session={client.cookies['tessera-session']}"}
        client.post("/login", data={"username": "bob", "password": users.tokens["bob"]})
        assert client.get("/config").status_code == 200
        with client_of(users) as other:
            assert other.get("/config", headers=before).status_code == 401


def test_nobody_signs_others_out_by_signing_in_often(tmp_path, monkeypatch):
    monkeypatch.setattr(logins, "MAX_LOGINS_PER_USER", 3)
    monkeypatch.setattr(logins, "MAX_LOGINS", 6)
    names = {name: add_user(tmp_path / "users.json", name) for name in ("ann", "bob")}
    table = logins.LoginTable(TokenTable(tmp_path / "users.json"))
    bobs = table.open("bob", names["bob"])
    anns = [table.open("ann", names["ann"]) for _ in range(20)]
    signed_in = [table.user(f"tessera-session={value}") is not None for value in anns]
    assert signed_in == [False] * 17 + [True] * 3
    assert table.user(f"tessera-session={bobs}").name == "bob"


@pytest.mark.parametrize("others", ['a={"x":"y"}', 'foo"=', "b@c=1", "no value", "tessera-session=x", "\xfc=1"])
def test_cookies_of_other_servers_of_the_host_are_in_nobodys_way(users, others):
    with client_of(users, "ann") as client:
        own = f"tessera-session={client.cookies['tessera-session']}"
    with client_of(users) as client:
        for header in (f"{others}; {own}", f"{own}; {others}"):
            assert client.get("/config", headers={"Cookie": header.encode("latin-1")}).status_code == 200


# --------------------------------------------------------------------------- connections


def half_open(served, count, sent=b""):
    sockets = []
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", served.port), 10)
        one.sendall(sent)
        sockets.append(one)
    return sockets


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: 127", b"POST /v1/jobs HTTP/1.1\r\n"])
def test_half_open_connections_do_not_shut_others_out(tmp_path, monkeypatch, sent):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 24)
    with serving_page(tmp_path, with_users=False) as served:
        sockets = half_open(served, 120, sent)
        with client_of(served) as client:
            assert client.get("/v1/health").json()["status"] == "ok"
            assert len(served.server.server_state.connections) <= 24
        for one in sockets:
            one.close()


def test_strangers_who_sign_in_slowly_do_not_shut_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 24)
    with serving_page(tmp_path) as served:
        head = f"POST /login HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 999\r\n\r\nx"
        sockets = half_open(served, 60, head.encode())
        with client_of(served, "ann") as client:
            assert client.get("/v1/models").status_code == 200
        for one in sockets:
            one.close()


def test_streams_of_one_user_do_not_shut_others_out(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 24)
    with serving_page(tmp_path) as served:
        head = f"GET /gradio_api/heartbeat/eves HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
        head += f"Authorization: Bearer {served.tokens['eve']}\r\n\r\n"
        with client_of(served, "ann") as client, client.stream("GET", "/gradio_api/heartbeat/anns") as anns:
            beats = anns.iter_text()
            assert "ALIVE" in next(beats)
            sockets = half_open(served, 60, head.encode())
            with client_of(served) as other:
                assert other.get("/v1/models", headers=bearer(served, "bob")).status_code == 200
            users_now = [one.user for one in served.server.server_state.connections if not one.transport.is_closing()]
            assert len(users_now) <= 24
            assert "ann" in users_now
        for one in sockets:
            one.close()


def test_strangers_have_less_time_for_a_body(tmp_path):
    sizes = BodyLimits(public_seconds=0.3)
    with serving_page(tmp_path, sizes=sizes) as served:
        head = f"POST /login HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 99\r\n\r\n"
        assert raw(served, head, b"x", seconds=20).startswith(b"HTTP/1.1 408")


def test_silent_connections_and_slow_headers_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with serving_page(tmp_path, with_users=False) as served:
        for one in half_open(served, 2, b"GET /v1/health HTTP/1.1\r\nHost:"):
            one.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(100) == b""  # closed by the server


def test_a_body_that_does_not_come_is_given_up(tmp_path):
    sizes = BodyLimits(part_seconds=0.3, body_seconds=1.0)
    with serving_page(tmp_path, with_users=False, sizes=sizes) as served:
        head = f"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 1000\r\n\r\n"
        assert raw(served, head, b"{", seconds=20).startswith(b"HTTP/1.1 408")


def test_bodies_share_what_may_be_in_memory(tmp_path):
    sizes = BodyLimits(buffered_bytes=150_000)
    with serving_page(tmp_path, with_users=False, sizes=sizes) as served:
        head = f"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 200000\r\n\r\n".encode()
        (holder,) = half_open(served, 1, head + b" " * 100_000)
        with client_of(served) as client:
            deadline = time.monotonic() + 20
            while (status := client.post("/v1/jobs", content=b" " * 100_000).status_code) == 422:
                assert time.monotonic() < deadline
            assert status == 503
            assert client.get("/v1/health").status_code == 200
        holder.close()


def test_the_schema_is_for_users(users):
    with client_of(users) as client:
        assert client.get("/v1/openapi.json").status_code == 401
        schema = client.get("/v1/openapi.json", headers=bearer(users, "eve")).json()
    assert schema["paths"]["/v1/jobs"]["post"]["requestBody"]["required"] is True
    named = {text.split('"')[0] for text in json.dumps(schema).split("#/components/schemas/")[1:]}
    assert named <= set(schema["components"]["schemas"])


def test_uploads_of_a_user_are_limited(tmp_path):
    sizes = BodyLimits(uploads_per_user=2)
    with serving_page(tmp_path, with_users=False, sizes=sizes) as served, client_of(served) as client:
        head = f"POST /v1/pictures HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 9000\r\n\r\n".encode()
        holders = half_open(served, 2, head + b"x")
        content = png(tmp_path).read_bytes()
        deadline = time.monotonic() + 20
        while (status := client.post("/v1/pictures", content=content).status_code) == 201:
            assert time.monotonic() < deadline
        assert status == 429
        for one in holders:
            one.close()
        while client.post("/v1/pictures", content=content).status_code != 201:
            assert time.monotonic() < deadline
