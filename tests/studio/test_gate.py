"""What stands before Gradio's routes, over raw HTTP: files, sessions of others, roles, and routes nobody needs."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest

from apps.service.limits import UploadQuota
from apps.studio.handed_in import HandedIn
from tests.studio.serving import client_of, pages_of, png, serving_page


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """Serve with users, from a folder whose path has capital letters."""
    folder = tmp_path_factory.mktemp("Users")
    with serving_page(folder, out="Out-Of-Studio") as served:
        (folder / "secret.txt").write_text("three secret prompts")
        served.secret = folder / "secret.txt"
        yield served


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Local")
    with serving_page(folder, out="Out", with_users=False) as served:
        (folder / "secret.txt").write_text("three secret prompts")
        served.secret = folder / "secret.txt"
        yield served


def file_events(page):
    """Return the numbers of a page's events that take a file, with the place of the file among what they take."""
    events = []
    for number, event in page.fns.items():
        kinds = [type(component).__name__ for component in event.inputs]
        events += [
            (number, kinds.index(kind), len(kinds)) for kind in ("UploadButton", "File", "Image") if kind in kinds
        ]
    return events


def ask_with_file(number, place, count, path):
    file = {"path": str(path), "orig_name": "x.txt", "meta": {"_type": "gradio.FileData"}}
    data = [file if i == place else None for i in range(count)]
    return {"data": data, "fn_index": number, "session_hash": "abc123", "trigger_id": None, "event_data": None}


def answer_of(client, prefix, body):
    """Send an event and return what comes of it, as text."""
    joined = client.post(f"{prefix}/gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.status_code, joined.text
    with client.stream("GET", f"{prefix}/gradio_api/queue/data", params={"session_hash": body["session_hash"]}) as told:
        return 200, "".join(told.iter_text())


@pytest.mark.parametrize("name", [None, "ann", "root"])
def test_no_event_reads_a_file_that_its_user_has_not_uploaded(local, users, name, tmp_path):
    served = local if name is None else users
    hostile = [served.secret, png(tmp_path), "/etc/passwd", served.out / ".tessera" / "jobs.sqlite", "../secret.txt",
               "", f"/proc/self/cwd/../..{served.secret}"]  # fmt: skip
    seen = 0
    with client_of(served, name) as client:
        for prefix, page in pages_of(served.app).items():
            for number, place, count in file_events(page):
                seen += 1
                for path in hostile:
                    body = {**ask_with_file(number, place, count, path), "session_hash": f"of-{name}"}
                    status, text = answer_of(client, prefix, body)
                    assert (status, "secret prompts" in text) == (403, False), (prefix, number, path)
                    nested = {**body, "data": [[{"x": body["data"]}]]}
                    assert client.post(f"{prefix}/gradio_api/queue/join", json=nested).status_code == 403
    # Eight a language: an image to start from, two ends of a clip, a clip, settings, prompts, presets, training.
    assert seen == 16


def test_without_the_gate_gradio_itself_would_refuse(users):
    """If this fails with a new Gradio, the gate is the only thing between a request and the files of the machine."""
    for page in pages_of(users.app).values():
        assert page.has_launched


def test_uploads_work_for_who_made_them_and_for_nobody_else(users):
    with client_of(users, "ann") as ann, client_of(users, "bob") as bob, client_of(users, "eve") as eve:
        content = {"files": ("many.txt", b"a fox\na ghost\n", "text/plain")}
        assert eve.post("/gradio_api/upload", files=content).status_code == 403  # the role `watch` hands in nothing
        (path,) = ann.post("/gradio_api/upload", files=content).json()
        page = pages_of(users.app)[""]
        many = next(one for one in file_events(page) if "many" in str(page.fns[one[0]].inputs[0].elem_id))
        body = ask_with_file(*many, path)
        assert bob.post("/gradio_api/queue/join", json={**body, "session_hash": "bobs"}).status_code == 403
        status, text = answer_of(ann, "", {**body, "session_hash": "anns"})
        assert status == 200
        assert "process_completed" in text


def test_users_who_hand_in_the_same_file_both_may_use_it(users):
    content = {"files": ("same.txt", b"a fox\n", "text/plain")}
    page = pages_of(users.app)[""]
    many = next(one for one in file_events(page) if "many" in str(page.fns[one[0]].inputs[0].elem_id))
    with client_of(users, "ann") as ann, client_of(users, "bob") as bob:
        for name, client in (("ann", ann), ("bob", bob)):
            (path,) = client.post("/gradio_api/upload", files=content).json()
            body = {**ask_with_file(*many, path), "session_hash": f"{name}same"}
            assert client.post("/gradio_api/queue/join", json=body).status_code == 200


def test_what_an_event_tells_of_the_page_names_no_file_elsewhere(local):
    body = ask_with_file(0, 0, 0, "x") | {"session_hash": "told"}
    with client_of(local) as client:
        for path, status in ((str(local.secret), 403), ("/etc/passwd", 403), (7, 403)):
            told = {"index": 0, "value": {"image": {"path": path}}}
            answer = client.post("/gradio_api/queue/join", json={**body, "event_data": told})
            assert answer.status_code == status, path


def test_uploads_to_the_page_have_a_quota(tmp_path):
    kept = HandedIn(UploadQuota(pictures=3, bytes=1_000))
    files = [tmp_path / f"{i}.txt" for i in range(5)]
    for file in files:
        file.write_bytes(b"x" * 100)
    kept.add(str(files[0]), "bob")
    for file in files:
        kept.add(str(file), "ann")
    assert [kept.owns(str(file), "ann") for file in files] == [False, False, True, True, True]
    assert [file.is_file() for file in files] == [True, False, True, True, True]  # bob has the first one too
    files[1].write_bytes(b"x" * 950)
    kept.add(str(files[1]), "ann")
    assert [kept.owns(str(file), "ann") for file in files] == [False, True, False, False, False]


def test_the_quota_holds_over_http(tmp_path, monkeypatch):
    monkeypatch.setattr("apps.studio.handed_in.UploadQuota", lambda: UploadQuota(pictures=2))
    with serving_page(tmp_path, with_users=False) as served, client_of(served) as client:
        paths = []
        for i in range(4):
            prefix = "/zh" if i % 2 else ""
            content = {"files": (f"{i}.txt", os.urandom(64), "text/plain")}
            paths += client.post(f"{prefix}/gradio_api/upload", files=content).json()
        assert [os.path.exists(path) for path in paths] == [False, False, True, True]


# ------------------------------------------------------------------------------- files


def test_no_file_of_the_server_is_served(users):
    with client_of(users, "root") as client:
        state = users.out / ".tessera" / "jobs.sqlite"
        assert sqlite3.connect(f"file:{state}?mode=ro&immutable=1", uri=True)
        paths = [state, str(state).lower(), users.secret, users.users, users.out, "/etc/passwd", "/proc/self/environ",
                 "http://127.0.0.1:22/", f"{users.out}/../secret.txt"]  # fmt: skip
        paths += [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        for prefix in ("", "/zh"):
            for path in paths:
                for route in (f"/gradio_api/file={path}", f"/gradio_api/file/{path}", f"/file={path}"):
                    assert client.get(prefix + route).status_code in (403, 404), route


def test_links_are_not_followed(users):
    link = users.out / "20260101-000000-1-0123456789abcdef-0.png"
    link.symlink_to(users.secret)
    try:
        with client_of(users, "root") as client:
            assert client.get(f"/outputs/{link.name}").status_code == 404
            assert client.get(f"/gradio_api/file={link}").status_code == 403
    finally:
        link.unlink()


def test_images_are_served_to_their_owner(users):
    ask = {"task": "text_to_image", "prompt": "x", "steps": 1}
    with client_of(users, "ann") as ann, client_of(users, "bob") as bob, client_of(users, "root") as root:
        job = ann.post("/v1/jobs", json=ask).json()["id"]
        assert users.engine.stream(job).wait_closed(20)
        name = users.engine.pictures(job)[0].name
        answer = ann.get(f"/outputs/{name}")
        assert answer.content == (users.out / name).read_bytes()
        assert root.get(f"/outputs/{name}").status_code == 200
        assert bob.get(f"/outputs/{name}").status_code == 404
        (users.out / "other.png").write_bytes(b"x")  # no image of a job
        for other in ("other.png", ".tessera", "..%2fsecret.txt", "x" * 300 + ".png"):
            assert root.get(f"/outputs/{other}").status_code == 404, other


# ---------------------------------------------------------------------------- sessions


def test_sessions_belong_to_the_user_who_opened_them(users):
    with client_of(users, "ann") as ann, client_of(users, "bob") as bob:
        body = {"data": [], "fn_index": 0, "session_hash": "annspage"}
        ann.post("/gradio_api/queue/join", json=body)
        for answer in (
            bob.post("/gradio_api/queue/join", json=body),
            bob.post("/gradio_api/run/predict", json=body),
            bob.get("/gradio_api/queue/data", params={"session_hash": "annspage"}),
            bob.get("/gradio_api/heartbeat/annspage"),
            bob.post("/gradio_api/cancel", json={"session_hash": "annspage", "fn_index": 0, "event_id": "x"}),
            bob.post("/gradio_api/cancel", json={"session_hash": "bobs", "fn_index": 0, "event_id": "anns"}),
        ):
            assert answer.status_code == 404, answer.request.url


def test_a_session_can_not_be_hidden_behind_another_one(users):
    with client_of(users, "ann") as ann, client_of(users, "bob") as bob:
        ann.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0, "session_hash": "annshidden"})
        for query in ("session_hash=bobs2&session_hash=annshidden", "session_hash=annshidden&session_hash=bobs2", ""):
            answer = bob.get(f"/gradio_api/queue/data?{query}")
            assert answer.status_code == 404, query
        for session in (None, 7, True, ["annshidden"], {"a": 1}):
            body = {"data": [], "fn_index": 0, "session_hash": session}
            for path in ("queue/join", "run/predict", "cancel", "reset"):
                assert bob.post(f"/gradio_api/{path}", json=body).status_code == 404, (session, path)


def test_news_of_a_session_without_any_end_at_once_and_leave_no_trace(users, caplog):
    with client_of(users, "eve") as eve:
        answer = eve.get("/gradio_api/queue/data", params={"session_hash": "never-joined"})
    assert answer.status_code == 200
    told = json.loads(answer.text.removeprefix("data: "))
    assert (told["msg"], told["session_not_found"]) == ("unexpected_error", True)
    assert not [record for record in caplog.records if record.exc_info]


def test_calls_that_gradio_would_fail_on_are_refused_before_their_values_reach_a_log(local, caplog):
    calls = [{"data": ["hush"] * 999, "fn_index": 0}, {"data": "hush", "fn_index": 0}]
    calls += [{"data": ["hush"], "fn_index": 10**6}]
    calls += [{"data": ["hush"], "fn_index": True}, {"data": ["hush"], "fn_index": "0"}, {"data": ["hush"]}]
    with client_of(local) as client:
        for call in calls:
            for path in ("queue/join", "run/predict"):
                answer = client.post(f"/gradio_api/{path}", json={**call, "session_hash": "short"})
                assert answer.status_code == 422, call
    assert "hush" not in caplog.text


def test_routes_that_the_page_does_not_use_are_closed(local):
    closed = ["/gradio_api/token", "/monitoring", "/gradio_api/runs", "/gradio_api/deep_link", "/gradio_api/vibe-code",
              "/gradio_api/openapi.json", "/gradio_api/dev/reload", "/gradio_api/proxy=http://127.0.0.1/", "/logout",
              "/gradio_api/stream/a/b/1/playlist.m3u8", "/gradio_api/call/x/y", "/gradio_api/user"]  # fmt: skip
    posts = ["/login", "/gradio_api/vibe-code", "/gradio_api/vibe-edit", "/gradio_api/component_server",
             "/gradio_api/run/predict", "/gradio_api/call/x", "/gradio_api/stream/x", "/gradio_api/process_recording",
             "/gradio_api/run-history/connect"]  # fmt: skip
    with client_of(local) as client:
        for path in closed:
            assert client.get(path).status_code == 404, path
        for path in posts:
            assert client.post(path, json={}).status_code in (404, 405), path
        for body in (b"[]", b"{", b'{"data": NaN}', b"[" * 100_000, b"\xff"):
            assert client.post("/gradio_api/queue/join", content=body).status_code == 422, body[:20]
