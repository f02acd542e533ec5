"""What OpenAI's clients send and read: models, images, edits, variations, streams and errors, over HTTP bodies."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from apps.api import openai
from apps.api.app import create_app
from apps.api.openai import MAX_FORM_BYTES, UPLOAD_PATHS
from apps.api.tokens import TokenTable, add_user
from apps.commands.serve import _start, check_port
from apps.service import limits
from apps.service.engine import Engine
from apps.service.metadata import read_picture
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.studio.fakes import FakePipeline
from tests.studio.test_parts import of_classes, of_entries

SHORT = {"prompt": "a fox", "steps": 2}


@contextmanager
def serving(folder, pipe, tokens=None, key="fake"):
    """Serve an engine of one pipeline; yields a client and the engine."""
    engine = Engine({key: "user/repository"}, folder, device="cpu", load=lambda source: pipe)
    try:
        engine.model().result(60)
        with TestClient(create_app(engine, tokens, ("testserver",))) as client:
            yield client, engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("fake"), FakePipeline()) as running:
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model of ours: from text, from an image, and in part."""
    with serving(tmp_path_factory.mktemp("tiny"), tiny_text_to_image_pipeline(), key="someone/tiny") as running:
        yield running


def file_of(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def noise(size=(32, 32)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def mask_of(size=(32, 32)):
    """An image whose left half is transparent."""
    alpha = np.full(size, 255, np.uint8)
    alpha[:, : size[1] // 2] = 0
    mask = noise(size).convert("RGBA")
    mask.putalpha(Image.fromarray(alpha))
    return mask


def image_of(row):
    image = Image.open(io.BytesIO(base64.b64decode(row["b64_json"])))
    image.load()
    return image


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for foreign in ("Traceback", "Input should", "pydantic"):
        assert foreign not in error["message"]
    return error


def events_of(answer):
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.split("\n\n") if block]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def test_a_model_is_described_by_its_name(fake, tiny):
    row = fake[0].get("/v1/models/fake").json()
    assert (row["id"], row["object"], row["tasks"]) == ("fake", "model", ["text_to_image"])
    assert row in fake[0].get("/v1/models").json()["data"]
    assert tiny[0].get("/v1/models/someone%2Ftiny").json()["id"] == "someone/tiny"
    absent = fake[0].get("/v1/models/gpt-image-1")
    assert (absent.status_code, error_of(absent)["code"], error_of(absent)["param"]) == (
        404,
        "model_not_found",
        "model",
    )


@pytest.mark.parametrize(("form", "kind"), [(None, "PNG"), ("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_output_formats(fake, tmp_path, form, kind):
    body = {**SHORT, "seed": 3} if form is None else {**SHORT, "seed": 3, "output_format": form}
    (row,) = fake[0].post("/v1/images/generations", json=body).json()["data"]
    assert image_of(row).format == kind
    if kind != "JPEG":
        (tmp_path / f"a.{kind.lower()}").write_bytes(base64.b64decode(row["b64_json"]))
        assert read_picture(tmp_path / f"a.{kind.lower()}").seed == row["seed"] == 3


def test_an_address_of_a_jpeg_is_refused(fake):
    wrong = fake[0].post("/v1/images/generations", json={**SHORT, "output_format": "jpeg", "response_format": "url"})
    assert (wrong.status_code, error_of(wrong)["param"]) == (422, "response_format")


def test_what_has_no_meaning_is_named(fake):
    ignored = {"background": "transparent", "quality": "hd", "style": "vivid", "moderation": "low", "user": "u1",
               "output_compression": 50}  # fmt: skip
    answer = fake[0].post("/v1/images/generations", json={**SHORT, **ignored})
    assert answer.status_code == 200
    told = answer.json()["warnings"]
    assert [one.partition(":")[0] for one in told] == list(ignored)
    assert all(name in answer.headers["warning"] for name in ignored)
    default_options = {"background": "auto", "quality": "standard", "moderation": "auto", "size": None, "n": None}
    plain = fake[0].post("/v1/images/generations", json={**SHORT, **default_options})
    assert plain.status_code == 200
    assert "warnings" not in plain.json()
    assert "warning" not in plain.headers


@pytest.fixture
def previews(monkeypatch):
    """A preview at every step."""
    monkeypatch.setattr("apps.service.inference.PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr("apps.service.inference.PREVIEW_SHARE", 1e9)


def test_a_stream_sends_previews_and_then_the_image(fake, previews):
    body = {**SHORT, "steps": 8, "n": 2, "seed": 1, "stream": True, "partial_images": 2, "user": "u1"}
    told = events_of(fake[0].post("/v1/images/generations", json=body))
    names = [name.partition(".")[2] for name, _ in told]
    assert names == ["partial_image", "partial_image", "completed"] * 2
    assert all(data["type"] == name and name.startswith("image_generation.") for name, data in told)
    assert [data["partial_image_index"] for name, data in told if "partial" in name] == [0, 1, 0, 1]
    last = told[-1][1]
    assert (last["seed"], last["size"], last["output_format"]) == (2, "128x128", "png")
    assert image_of(last).size == (128, 128)
    assert last["warnings"] == ["user: has no effect here and was ignored"]
    for _, data in told[:2]:
        assert image_of(data).size == tuple(map(int, data["size"].split("x")))
    assert {"created_at", "quality", "background", "b64_json"} <= set(told[0][1])


def test_a_stream_tells_its_error(fake):
    told = events_of(fake[0].post("/v1/images/generations", json={**SHORT, "size": "72x72", "stream": True}))
    ((name, data),) = told
    assert name == "error"
    assert "multiple of 16" in data["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"prompt": " "}, "prompt", "empty"),
        ({}, "prompt", "missing"),
        ({**SHORT, "n": 99}, "n", "choose 1 to 16"),
        ({**SHORT, "steps": 0}, "steps", "choose 1 to 200"),
        ({**SHORT, "size": "big"}, "size", "WIDTHxHEIGHT"),
        ({**SHORT, "size": "8x8"}, "size", "32 to 2048"),
        ({**SHORT, "output_format": "gif"}, "output_format", "choose png, webp or jpeg"),
        ({**SHORT, "partial_images": 4, "stream": True}, "partial_images", "choose 0 to 3"),
        ({**SHORT, "partial_images": 1}, "partial_images", "stream"),
        ({**SHORT, "stream": True, "response_format": "url"}, "response_format", "b64_json"),
        ({**SHORT, "stream": "perhaps"}, "stream", "true or false"),
        ({**SHORT, "tools": []}, "tools", "no such setting"),
    ],
)
def test_errors_name_their_field(fake, body, param, told):
    answer = fake[0].post("/v1/images/generations", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["type"]) == (422, param, "invalid_request_error")
    assert told in error["message"]


def test_an_unknown_model_is_not_found(fake):
    for path, files in (("generations", None), ("edits", {"image": file_of(noise())})):
        send = (
            {"json": {**SHORT, "model": "gpt-image-1"}}
            if files is None
            else {"data": {**SHORT, "model": "x"}, "files": files}
        )
        answer = fake[0].post(f"/v1/images/{path}", **send)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_model")


def test_unknown_paths_and_wrong_methods_have_the_shape_too(fake):
    client, _ = fake
    for path in ("/v1", "/v1/chat/completions", "/v1/nothing/at/all"):
        answer = client.post(path, json={})
        assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
    for method, path, allowed in (
        ("GET", "/v1/images/generations", "POST"), ("PUT", "/v1/images/edits", "POST"), ("POST", "/v1/images", "GET"),
        ("PUT", "/v1/models", "GET, POST"),
        ("PUT", "/v1/models/fake", "GET, DELETE"), ("PUT", "/v1/jobs", "GET, POST"),
    ):  # fmt: skip
        answer = client.request(method, path)
        assert (answer.status_code, error_of(answer)["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"] == allowed
    assert client.get("/v1/jobs?limit=0").status_code == 422
    assert error_of(client.get("/v1/jobs?limit=0"))["code"] == "bad_request"


# --------------------------------------------------------------------- a model of ours


def edit(client, path="edits", image=None, mask=None, name="image", **fields):
    files = {name: ("a.png", image or file_of(noise()), "image/png")}
    if mask is not None:
        files["mask"] = ("m.png", mask, "image/png")
    body = {"steps": "2", "seed": "4", **({} if path == "variations" else {"prompt": "a fox"}), **fields}
    return client.post(f"/v1/images/{path}", data=body, files=files)


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_an_edit_changes_what_is_transparent_and_keeps_the_rest(tiny, name):
    client, engine = tiny
    answer = edit(client, mask=file_of(mask_of()), name=name)
    assert answer.status_code == 200, answer.text
    after, before = np.asarray(image_of(answer.json()["data"][0])), np.asarray(noise())
    assert (after[:, 16:] == before[:, 16:]).all()
    assert (after[:, :16] != before[:, :16]).any()
    assert json.loads(engine.jobs(limit=1)[0].request)["task"] == "inpaint"


def test_an_edit_without_a_mask_and_a_variation_start_from_the_image(tiny):
    client, engine = tiny
    answer = edit(client, n="2", strength="0.5", output_format="webp", response_format="b64_json")
    assert [image_of(row).format for row in answer.json()["data"]] == ["WEBP", "WEBP"]
    asked = json.loads(engine.jobs(limit=1)[0].request)
    assert (asked["task"], asked["prompt"], asked["strength"]) == ("image_to_image", "a fox", 0.5)
    answer = edit(client, "variations", n="2", size="32x32")
    assert [row["seed"] for row in answer.json()["data"]] == [4, 5]
    assert answer.json()["warnings"][0].startswith("prompt: none was sent")
    assert json.loads(engine.jobs(limit=1)[0].request)["task"] == "image_to_image"
    assert "warnings" not in edit(client, "variations", prompt="a fox").json()


def test_an_edit_can_be_streamed(tiny, previews):
    told = events_of(edit(tiny[0], mask=file_of(mask_of()), steps="6", stream="true", partial_images="1"))
    assert [name for name, _ in told] == ["image_edit.partial_image", "image_edit.completed"]


def test_images_that_can_not_be_used(tiny):
    client, _ = tiny
    for changes, param, told in (
        ({"image": b"GIF89a"}, "image", "PNG"),
        ({"mask": b"GIF89a"}, "mask", "PNG"),
        ({"mask": file_of(noise())}, "mask", "opaque"),
        ({"mask": file_of(mask_of((64, 64)))}, "mask", "64 x 64"),
        ({"steps": "0"}, "steps", "choose 1 to 200"),
        ({"tools": "x"}, "tools", "no such setting"),
    ):
        answer = edit(client, **changes)
        assert (answer.status_code, error_of(answer)["param"]) == (422, param)
        assert told in error_of(answer)["message"]
    for send in (
        {"data": SHORT},
        {"json": SHORT},
        {"data": {**SHORT, "image": "text"}, "files": {"mask": file_of(mask_of())}},
    ):
        answer = client.post("/v1/images/edits", **send)
        assert answer.status_code == 422
        assert error_of(answer)["param"] in ("image", "prompt")


def test_at_most_two_files_and_one_of_each(tiny):
    client, _ = tiny
    one = ("a.png", file_of(noise()), "image/png")
    for files, status in (
        ([("image", one)] * 3, 400),
        ([("image[]", one)] * 2, 422),
        ([("image", one), ("x", one)], 422),
    ):
        answer = client.post("/v1/images/edits", data=SHORT, files=files)
        assert answer.status_code == status
        error_of(answer)
    answer = client.post(
        "/v1/images/edits", content=b"nonsense", headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert answer.status_code in (400, 422)
    error_of(answer)


@pytest.mark.parametrize("path", UPLOAD_PATHS)
def test_bodies_are_cut_off_before_they_are_read_whole(fake, path):
    client, _ = fake
    head, answered = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n', []
    headers = [(b"host", b"testserver"), (b"content-type", b"multipart/form-data; boundary=b")]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": headers, "scheme": "http", "server": ("testserver", 80), "client": ("c", 1),
             "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0"}}  # fmt: skip
    read = 0

    async def receive():
        nonlocal read
        body = head if read == 0 else b"x" * (1 << 20)
        read += len(body)
        assert read < 2 * MAX_FORM_BYTES
        return {"type": "http.request", "body": body, "more_body": True}

    async def send(message):
        answered.append(message)

    asyncio.run(client.app(scope, receive, send))
    assert answered[0]["status"] == 413
    assert json.loads(answered[1]["body"])["error"]["code"] == "too_large"
    assert read < MAX_FORM_BYTES + (2 << 20)


def test_a_large_file_in_a_body_that_is_taken(tiny):
    large = edit(tiny[0], image=b"x" * (limits.MAX_UPLOAD_BYTES + 1))
    assert (large.status_code, error_of(large)["param"]) == (422, "image")


def test_what_a_model_can_not_do_is_stream_events(fake, tmp_path):
    answer = edit(fake[0], "variations")
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (422, "unsupported", "model")
    assert "image to image" in error_of(answer)["message"]
    assert edit(fake[0], mask=file_of(mask_of())).status_code == 422


def test_next_scale_models_are_asked_in_their_own_tasks(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with serving(tmp_path / "a", of_entries()) as (client, engine):
        assert client.post("/v1/images/generations", json={"prompt": "a fox"}).status_code == 200
        assert json.loads(engine.jobs(limit=1)[0].request)["task"] == "next_scale_text"
        wrong = client.post("/v1/images/generations", json=SHORT)
        assert (wrong.status_code, error_of(wrong)["param"]) == (422, "steps")
        mask = file_of(mask_of((48, 48)))
        files = {"image": file_of(noise((48, 48))), "mask": mask}
        assert client.post("/v1/images/edits", data={"prompt": "a fox"}, files=files).status_code == 200
        without = client.post("/v1/images/edits", data={"prompt": "a fox"}, files={"image": files["image"]})
        assert "mask" in error_of(without)["message"]
    with serving(tmp_path / "b", of_classes()) as (client, engine):
        assert client.post("/v1/images/generations", json={"prompt": "1"}).status_code == 200
        assert json.loads(engine.jobs(limit=1)[0].request)["label"] == 1


def test_roles(tmp_path):
    users = {role: add_user(tmp_path / "users.json", role, role) for role in ("view", "generate")}
    (tmp_path / "out").mkdir()
    with serving(tmp_path / "out", FakePipeline(), TokenTable(tmp_path / "users.json")) as (client, _):
        bearer = {name: {"Authorization": f"Bearer {token}"} for name, token in users.items()}
        assert client.get("/v1/models/fake").status_code == 401
        assert client.get("/v1/models/fake", headers=bearer["view"]).status_code == 200
        for path in (*UPLOAD_PATHS, "/v1/images/generations"):
            for headers, status in (({}, 401), (bearer["view"], 403), (bearer["generate"], 422)):
                answer = client.post(path, headers=headers)
                assert answer.status_code == status
                error_of(answer)


def test_the_built_in_model(tmp_path):
    engine = Engine({"stickers": "stickers"}, tmp_path, device="cpu")
    try:
        with TestClient(create_app(engine, None, ("testserver",))) as client:
            made = client.post("/v1/images/generations", json={"prompt": "a red apple", "steps": 2, "seed": 1}).json()
            image = image_of(made["data"][0])
            changed = edit(client, image=file_of(image), mask=file_of(mask_of(image.size[::-1])), prompt="a fox")
            assert changed.status_code == 200
            after = image_of(changed.json()["data"][0])
            assert after.size == image.size
            half = image.width // 2
            assert (np.asarray(after)[:, half:] == np.asarray(image)[:, half:]).all()
            assert edit(client, "variations", image=file_of(image), n="1").status_code == 200
    finally:
        engine.close()


def test_a_caller_who_leaves_a_stream_stops_the_work(tmp_path):
    engine = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: FakePipeline(0.05))
    port = check_port("127.0.0.1", 0)
    server = _start(create_app(engine), "127.0.0.1", port)
    try:
        body = {"prompt": "x", "steps": 200, "n": 16, "stream": True, "partial_images": 3}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/images/generations", json=body, trust_env=False,
                          timeout=60) as answer:  # fmt: skip
            next(answer.iter_lines())
        job = engine.jobs(limit=1)[0].id
        assert engine.stream(job).wait_closed(60)
        assert engine.job(job).state == "stopped"
    finally:
        server.should_exit = True
        engine.close()


def test_warnings_name_words_that_the_model_does_not_know(fake, monkeypatch):
    client, engine = fake
    pipe = engine.model().result().pipe_for("text_to_image")
    monkeypatch.setattr(pipe, "unknown_words", lambda prompts: ("\u72d0",), raising=False)
    answer = client.post("/v1/images/generations", json={**SHORT, "n": 2, "user": "u1"}).json()
    ignored, note = answer["warnings"]
    assert ignored.startswith("user:")
    assert "'\u72d0'" in note
    told = events_of(client.post("/v1/images/generations", json={**SHORT, "stream": True}))
    assert told[-1][1]["warnings"] == [note]


def test_a_stream_that_is_broken_off_while_the_server_ends_touches_no_closed_queue():
    def refuse(job):
        raise AssertionError("the queue is closed")

    asked = SimpleNamespace(body=SimpleNamespace(partial_images=0))
    stream = SimpleNamespace(is_closed=False, read=lambda after: [])

    async def read_and_leave():
        told = openai._stream_events(asked, SimpleNamespace(is_closing=True, stop=refuse), "job", stream)
        reading = asyncio.ensure_future(anext(told))
        await asyncio.sleep(0.1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(read_and_leave())
