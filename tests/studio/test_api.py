"""The HTTP API over real sockets: what it does, who may do it, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import threading
import time
import zlib
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image, PngImagePlugin

from apps.api.app import create_app
from apps.api.tokens import TokenTable, add_user, read_users
from apps.commands.serve import _start, check_port
from apps.service.engine import Engine
from apps.service.limits import ServerLimits
from apps.service.metadata import CHUNK, read_picture
from apps.service.requests import REQUEST, TASKS
from apps.service.uploads import picture_id
from tests.studio.fakes import FakePipeline

ASK = {"task": "text_to_image", "prompt": "a fox", "steps": 3, "seed": 5}


@contextmanager
def serving(folder, pipe=None, tokens=None, **limits):
    """Serve an engine of fakes; yields its address, its engine and its pipeline."""
    pipe = pipe or FakePipeline(0.005)
    (folder / "out").mkdir(exist_ok=True)
    engine = Engine({"fake": "user/secret-repository"}, folder / "out", device="cpu", load=lambda source: pipe,
                    server_limits=ServerLimits(**limits))  # fmt: skip
    engine.model().result(60)
    port = check_port("127.0.0.1", 0)
    server = _start(create_app(engine, tokens), "127.0.0.1", port)
    try:
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", engine=engine, pipe=pipe, out=folder / "out")
    finally:
        server.should_exit = True
        engine.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.address, trust_env=False, timeout=30) as one:
        yield one


def events_of(client, job, headers=None, begun=None):
    """Read all server-sent events of a job: pairs of name and data; sets `begun` when the first one is there."""
    with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = []
        for part in answer.iter_text():
            parts.append(part)
            if begun is not None:
                begun.set()
        blocks = "".join(parts).split("\n\n")
    rows = [dict(line.split(": ", 1) for line in block.splitlines() if ": " in line) for block in blocks if block]
    return [(row["event"], json.loads(row["data"])) for row in rows if "event" in row]


def submit(client, headers=None, **changes):
    answer = client.post("/v1/jobs", json={**ASK, **changes}, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def test_a_job_from_submission_to_file(client, server):
    job = submit(client, num_images=2)
    told = events_of(client, job)
    names = [name for name, _ in told]
    assert names.count("step") == 6
    assert names.count("result") == 2
    assert names[-1] == "done"
    assert any(data.get("preview", "") for name, data in told if name == "step")
    row = client.get(f"/v1/jobs/{job}").json()
    assert (row["state"], row["owner"], len(row["pictures"])) == ("done", "local", 2)
    content = client.get(row["pictures"][1]["url"])
    assert content.headers["content-type"] == "image/png"
    file = server.out / next(one.name for one in server.engine.pictures(job) if one.place == 1)
    assert content.content == file.read_bytes()
    assert read_picture(file).seed == 6
    assert [name for name, _ in events_of(client, job)] == ["result", "result", "done"]  # also for who comes late
    assert client.get("/v1/jobs", params={"limit": 1}).json()["jobs"][0]["id"] == job


def test_settings_of_a_file_give_the_same_picture_again(client, server):
    first = client.get(f"/v1/jobs/{submit_and_wait(client, seed=77)}").json()["pictures"][0]
    settings = first["settings"]
    wish = {name: settings[name] for name in ("task", "prompt", "negative_prompt", "seed", "steps", "guidance",
                                              "width", "height", "model")}  # fmt: skip
    job = client.post("/v1/jobs", json=wish).json()["id"]
    events_of(client, job)
    second = client.get(f"/v1/jobs/{job}").json()["pictures"][0]
    pixels = [Image.open(io.BytesIO(client.get(one["url"]).content)).tobytes() for one in (first, second)]
    assert pixels[0] == pixels[1]
    assert second["settings"] == settings


def submit_and_wait(client, **changes):
    job = submit(client, **changes)
    events_of(client, job)
    return job


def test_openai_style(client):
    body = {"prompt": "a fox", "n": 2, "size": "64x96", "seed": 8, "steps": 2, "model": "fake"}
    data = client.post("/v1/images/generations", json=body).json()["data"]
    with Image.open(io.BytesIO(base64.b64decode(data[0]["b64_json"]))) as image:
        assert (image.size, image.format) == ((64, 96), "PNG")
    assert [one["seed"] for one in data] == [8, 9]
    (row,) = client.post("/v1/images/generations", json={"prompt": "x", "steps": 1, "response_format": "url"}).json()[
        "data"
    ]
    assert client.get(row["url"]).status_code == 200
    wrong = client.post("/v1/images/generations", json={"prompt": "x", "size": "72x72"})
    assert wrong.status_code == 422
    assert "multiple of 16" in wrong.json()["error"]["message"]


def test_stop_and_its_effect(tmp_path):
    pipe, stopped = FakePipeline(), threading.Event()
    pipe.at_step = lambda step: step < 2 or stopped.wait(60)
    with (
        serving(tmp_path, pipe) as running,
        httpx.Client(base_url=running.address, trust_env=False) as client,
    ):
        job, waiting = submit(client, steps=200), submit(client)
        assert client.get(f"/v1/jobs/{waiting}").json()["ahead"] == 1
        client.delete(f"/v1/jobs/{waiting}")
        while pipe.steps_run < 2:
            time.sleep(0.01)
        client.post(f"/v1/jobs/{job}/stop")
        stopped.set()
        assert running.engine.stream(job).wait_closed(60)
        assert running.pipe.steps_run == 3  # the one that ran when it was asked is the last
        assert running.pipe.decodes == 0
        states = [client.get(f"/v1/jobs/{one}").json()["state"] for one in (job, waiting)]
        assert states == ["stopped", "stopped"]
        assert client.post(f"/v1/jobs/{job}/finish").status_code == 409


def test_a_caller_who_leaves_stops_the_work(tmp_path):
    pipe, left = FakePipeline(0.05), threading.Event()
    pipe.at_step = lambda step: left.wait(60)
    with serving(tmp_path, pipe) as running:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.address}/v1/images/generations", json={"prompt": "x", "steps": 200}, timeout=0.5,
                       trust_env=False)  # fmt: skip
        left.set()
        deadline = time.monotonic() + 60
        while running.engine.jobs()[0].state != "stopped":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert running.pipe.decodes == 0


def test_a_full_line(tmp_path):
    with (
        serving(tmp_path, FakePipeline(0.05), queue=2) as running,
        httpx.Client(base_url=running.address, trust_env=False) as client,
    ):
        jobs = [submit(client, steps=200) for _ in range(2)]
        full = client.post("/v1/jobs", json=ASK)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert "full" in full.json()["error"]["message"]
        for job in jobs:
            client.delete(f"/v1/jobs/{job}")
        assert client.post("/v1/jobs", json=ASK).status_code == 202


def test_a_picture_is_skipped_and_the_line_reordered(tmp_path):
    with (
        serving(tmp_path, FakePipeline(0.05)) as running,
        httpx.Client(base_url=running.address, trust_env=False, timeout=30) as client,
    ):
        first = submit(client, num_images=2, steps=200)
        while client.get(f"/v1/jobs/{first}").json()["state"] != "running":
            time.sleep(0.02)
        jobs = [submit(client, seed=seed) for seed in (1, 2)]
        moved = client.patch(f"/v1/jobs/{jobs[1]}", json={"position": 0})
        assert (moved.status_code, moved.json()) == (200, {"id": jobs[1], "ahead": 1})
        assert client.get(f"/v1/jobs/{jobs[0]}").json()["ahead"] == 2
        refused = client.patch(f"/v1/jobs/{first}", json={"position": 0})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cant_move")
        for wrong in ({"position": -1}, {"position": "x"}, {"place": 1}, {}):
            assert client.patch(f"/v1/jobs/{jobs[0]}", json=wrong).status_code == 422
        waiting = client.post(f"/v1/jobs/{jobs[0]}/skip")
        assert (waiting.status_code, waiting.json()["error"]["code"]) == (409, "cant_skip")
        with client.stream("GET", f"/v1/jobs/{first}/events") as answer:
            lines = answer.iter_lines()
            next(line for line in lines if line == "event: step")
            assert client.post(f"/v1/jobs/{first}/skip").status_code == 200
            steps = (json.loads(line[6:]) for line in lines if line.startswith('data: {"step"'))
            assert next(step for step in steps if step["picture"] == 2)["step"] == 1
        client.delete(f"/v1/jobs/{first}")


# ------------------------------------------------------------------------- who may what

TABLE = [  # method, path, least role; None is for everybody
    ("GET", "/v1/health", None),
    ("GET", "/v1/models", "view"),
    ("GET", "/v1/models/fake", "view"),
    ("POST", "/v1/models", "admin"),
    ("DELETE", "/v1/models/absent", "admin"),
    ("GET", "/v1/model-download", "admin"),
    ("DELETE", "/v1/model-download", "admin"),
    ("GET", "/v1/loras", "view"),
    ("GET", "/v1/profiles", "view"),
    ("GET", "/v1/schema", "view"),
    ("GET", "/v1/jobs", "view"),
    ("GET", "/v1/jobs/{job}", "view"),
    ("GET", "/v1/jobs/{job}/events", "view"),
    ("GET", "/v1/jobs/{job}/pictures/0", "view"),
    ("GET", "/v1/jobs/{job}/clips/0", "view"),
    ("POST", "/v1/jobs", "generate"),
    ("POST", "/v1/pictures", "generate"),
    ("POST", "/v1/images/generations", "generate"),
    ("POST", "/v1/images/edits", "generate"),
    ("POST", "/v1/images/variations", "generate"),
    ("POST", "/v1/jobs/{job}/stop", "generate"),
    ("POST", "/v1/jobs/{job}/finish", "generate"),
    ("POST", "/v1/jobs/{job}/skip", "generate"),
    ("PATCH", "/v1/jobs/{job}", "generate"),
    ("DELETE", "/v1/jobs/{job}", "generate"),
]
RANK = {"view": 0, "generate": 1, "admin": 2}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    users = {role: add_user(folder / "users.json", role, role) for role in RANK}
    users["other"] = add_user(folder / "users.json", "other", "generate")
    with serving(folder, tokens=TokenTable(folder / "users.json")) as running:
        running.bearer = {name: {"Authorization": f"Bearer {token}"} for name, token in users.items()}
        running.job = running.engine.submit(REQUEST.validate_python(ASK), "view")
        assert running.engine.stream(running.job).wait_closed(60)
        yield running


@pytest.mark.parametrize(("method", "path", "least"), TABLE)
def test_the_table_of_401_and_403(guarded, method, path, least):
    path = path.format(job=guarded.job)
    with httpx.Client(base_url=guarded.address, trust_env=False) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic d2F0Y2g6eA=="}):
            status = client.request(method, path, headers=headers).status_code
            assert status == (200 if least is None else 401), headers
        for role, rank in RANK.items():
            status = client.request(method, path, headers=guarded.bearer[role]).status_code
            if least is not None and rank < RANK[least]:
                assert status == 403, role
            else:
                assert status not in (401, 403, 500), role


def test_users_do_not_see_each_other(guarded):
    with httpx.Client(base_url=guarded.address, trust_env=False) as client:
        mine = submit(client, guarded.bearer["generate"])
        events_of(client, mine, guarded.bearer["generate"])
        for path in ("", "/events", "/pictures/0"):
            assert client.get(f"/v1/jobs/{mine}{path}", headers=guarded.bearer["other"]).status_code == 404
            assert client.get(f"/v1/jobs/{mine}{path}", headers=guarded.bearer["admin"]).status_code == 200
        assert client.delete(f"/v1/jobs/{mine}", headers=guarded.bearer["other"]).status_code == 404
        listed = client.get("/v1/jobs", headers=guarded.bearer["other"]).json()["jobs"]
        assert mine not in [job["id"] for job in listed]


def test_two_users_know_their_places(tmp_path):
    users = {name: add_user(tmp_path / "users.json", name) for name in ("ann", "bob")}
    pipe, all_in_line = FakePipeline(), threading.Event()
    pipe.at_step = lambda step: all_in_line.wait(60)
    with (
        serving(tmp_path, pipe, TokenTable(tmp_path / "users.json")) as running,
        httpx.Client(base_url=running.address, trust_env=False, timeout=30) as client,
    ):
        heads = {name: {"Authorization": f"Bearer {token}"} for name, token in users.items()}
        submit(client, heads["ann"], steps=20)
        assert pipe.in_step.wait(60)  # the first one has left the line
        second, third = submit(client, heads["bob"], seed=1), submit(client, heads["ann"], seed=2)
        told, begun = {}, {second: threading.Event(), third: threading.Event()}
        readers = [
            threading.Thread(
                target=lambda job=job, name=name: told.update({job: events_of(client, job, heads[name], begun[job])})
            )
            for job, name in ((second, "bob"), (third, "ann"))
        ]
        for reader in readers:
            reader.start()
        assert all(one.wait(60) for one in begun.values())
        all_in_line.set()  # from here on the queue moves
        for reader in readers:
            reader.join(60)
    assert [data["ahead"] for name, data in told[second] if name == "queued"] == [1]
    assert [data["ahead"] for name, data in told[third] if name == "queued"] == [2, 1]
    seeds = {job: data["settings"]["seed"] for job in told for name, data in told[job] if name == "result"}
    assert seeds == {second: 1, third: 2}


def test_tokens_are_kept_as_hashes_and_may_be_renewed(tmp_path):
    file = tmp_path / "users.json"
    token = add_user(file, "ann")
    assert token not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    os.utime(file, (1, 1))  # so that the next change is seen, however coarse the clock of the disk is
    table = TokenTable(file)
    assert table.find(token).name == "ann"
    assert table.find(token, "bob") is None
    renewed = add_user(file, "ann", "view")
    assert table.find(token) is None  # the file is read again
    assert table.find(renewed).role == "view"
    assert len(read_users(file)) == 1
    file.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        read_users(file)
    with pytest.raises(ValueError, match="no name"):
        add_user(tmp_path / "new.json", "../x")
    with pytest.raises(ValueError, match="make one"):
        TokenTable(tmp_path / "absent.json")


# ---------------------------------------------------------------------- what is refused


def hostile_requests(count, seed=0):
    """Yield bodies that no honest client sends: wrong types, NaN, huge numbers, paths, deep nests, odd text."""
    rng = random.Random(seed)
    values = [
        None, True, -1, 0, 1e308, -1e308, float("nan"), float("inf"), 2**70, 10**9, "", " ", "x" * 5000, "../../passwd",
        "file:///etc/passwd", "\x00", "\ud800", "os.system", "user/repository", [], {}, [[[[]]]], {"a": {"b": 1}},
        "0" * 64,
        "<script>alert(1)</script>", "%2e%2e%2f", 3.7, [1, 2], "NaN", "a" * 64,
    ]  # fmt: skip
    known = sorted({name for kind in TASKS.values() for name in kind.model_fields})
    fields = [*known, "module", "path", "__class__"]
    for _ in range(count):
        body = {"task": rng.choice(list(TASKS)), "prompt": "x", "num_images": 1, "steps": 1}
        for field in rng.sample(fields, rng.randint(1, 4)):
            body[field] = rng.choice(values)
        yield body


def test_200_fuzzed_requests(client, server):
    taken = 0
    for body in hostile_requests(200):
        text = json.dumps(body).encode("utf-8", errors="surrogatepass")
        path = "/v1/jobs" if body.get("height") != 0 else "/v1/images/generations"
        answer = client.post(path, content=text, headers={"content-type": "application/json"})
        assert answer.status_code in (202, 404, 422, 429), (body, answer.text)
        if answer.status_code == 202:  # some chance hits are sound
            taken += 1
            assert server.engine.stream(answer.json()["id"]).wait_closed(20)
            state = client.get(f"/v1/jobs/{answer.json()['id']}").json()
            assert state["state"] in ("done", "failed"), body
            assert state["error"] is None or state["error"]["code"] in ("bad_request", "unknown_model"), (body, state)
        else:
            message = answer.json()["error"]["message"]
            for secret in ("Traceback", str(server.out), "secret-repository", "site-packages", "/work", "<script>"):
                assert secret not in message
    assert taken < 60
    assert client.get("/v1/health").json()["status"] == "ok"
    assert submit_and_wait(client)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 50_000, b'{"task": ["a"]}'])
def test_bodies_that_are_no_requests(client, content):
    for path in ("/v1/jobs", "/v1/images/generations"):
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/../../etc/passwd",
        "/v1/jobs/..%2f..%2fetc%2fpasswd",
        "/v1/jobs/{job}/pictures/../../../jobs.sqlite",
        "/v1/jobs/{job}/pictures/..%2f.tessera%2fjobs.sqlite",
        "/v1/jobs/{job}/pictures/-1",
        "/v1/jobs/{job}/pictures/99",
        "/v1/jobs/{job}/pictures/15",
        "/v1/jobs/0000000000000000",
        "/v1/jobs/0000000000000000/pictures/0",
        "/v1/jobs/AAAAAAAAAAAAAAAA",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_way_to_other_files(client, server, path):
    job = submit_and_wait(client)
    url = httpx.URL(server.address).copy_with(raw_path=path.format(job=job).encode())  # as written: httpx would tidy it
    answer = client.send(httpx.Request("GET", url))
    assert answer.status_code in (404, 422)
    assert "root:" not in answer.text
    assert not answer.content.startswith(b"SQLite")


def test_large_bodies_are_cut_off(client):
    assert client.post("/v1/jobs", content=b"x" * 300_000).status_code == 413
    assert client.post("/v1/pictures", content=b"x" * (21 * 1024 * 1024)).status_code == 413


def test_pages_of_other_sites_and_other_names_are_turned_away(client, server):
    foreign = client.post("/v1/jobs", json=ASK, headers={"Origin": "http://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "foreign_origin")
    assert client.post("/v1/jobs", json=ASK, headers={"Origin": server.address}).status_code == 202
    assert client.get("/v1/health", headers={"Host": "evil.example"}).status_code == 400


def png(size=(64, 48), colour="red", **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_pictures_handed_in_are_pixels_and_nothing_else(client, server):
    text = PngImagePlugin.PngInfo()
    text.add_itxt(CHUNK, json.dumps({"prompt": "<script>", "model": "../../x"}))
    text.add_text("Software", "; DROP TABLE jobs")
    answer = client.post("/v1/pictures", content=png(pnginfo=text))
    assert answer.status_code == 201
    name = answer.json()["id"]
    assert (
        name == picture_id(Image.new("RGB", (64, 48), "red")) == client.post("/v1/pictures", content=png()).json()["id"]
    )
    kept = (server.out / ".tessera" / "uploads" / f"{name}.png").read_bytes()
    assert b"script" not in kept
    assert b"DROP" not in kept


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n" + b"x" * 100,
        png()[:60],
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        png((1, 1))[:-20],
    ],
)
def test_what_is_no_picture(client, content):
    answer = client.post("/v1/pictures", content=content)
    assert answer.status_code in (201, 422)  # a cut PNG may still hold all its pixels
    assert "Traceback" not in answer.text


def test_a_picture_that_claims_to_be_huge(client):
    bomb = bytearray(png())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    answer = client.post("/v1/pictures", content=bytes(bomb))
    assert answer.status_code == 422
    assert "pixels" in answer.json()["error"]["message"]


def test_unknown_pictures_are_named(client):
    answer = client.post("/v1/jobs", json={"task": "image_to_image", "prompt": "x", "image": "0" * 64})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "unknown_picture")


def test_half_open_connections_do_not_stop_the_server(server, client):
    hanging = [socket.create_connection(("127.0.0.1", int(server.address.rsplit(":", 1)[1]))) for _ in range(20)]
    for one in hanging:
        one.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
    assert client.get("/v1/health").status_code == 200
    for one in hanging:
        one.close()
    assert submit_and_wait(client)


def test_results_carry_notes(tmp_path):
    pipe = FakePipeline()
    pipe.unknown_words = lambda prompts: tuple(word for word in ("teal",) if word in " ".join(prompts))
    with serving(tmp_path, pipe) as running, httpx.Client(base_url=running.address, trust_env=False) as client:
        for prompt, notes in (("three crabs on teal", 1), ("three crabs on blue", 0)):
            told = events_of(client, submit(client, prompt=prompt))
            (found,) = [data["notes"] for name, data in told if name == "result"]
            assert len(found) == notes
            assert "'teal'" in "".join(found) or not notes


def test_roles_are_read_by_their_earlier_names(tmp_path):
    file = tmp_path / "users.json"
    add_user(file, "ann", "paint")
    assert [user.role for user in read_users(file)] == ["generate"]
    file.write_text(file.read_text().replace('"generate"', '"watch"'))
    assert [user.role for user in read_users(file)] == ["view"]
    with pytest.raises(ValueError, match=r"owner.*view, generate, admin"):
        add_user(file, "ann", "owner")
