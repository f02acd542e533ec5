"""The tools of the Model Context Protocol: with its own client over a real socket, and with hostile requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from gradio.mcp import GradioMCPServer
from PIL import Image
from typer.testing import CliRunner

from apps.api.app import create_app
from apps.api.tokens import TokenTable, add_user
from apps.cli import app as command_line
from apps.commands import serve
from apps.commands.serve import _start, check_port
from apps.mcp import answers
from apps.mcp.answers import Shown, fitting
from apps.mcp.server import MissingMcpError, add_mcp
from apps.service.engine import Engine
from apps.service.limits import ServerLimits
from apps.service.metadata import parse, read_picture, save_picture
from apps.service.requests import TextToImageRequest
from apps.studio.app import FORMS, UPLOADS, mount
from tests.fresh import Python
from tests.pipes.tiny import tiny_text_to_image_pipeline
from tests.pipes.tiny_video import tiny_video_pipeline
from tests.studio.fakes import FakePipeline
from tests.studio.serving import bearer
from tests.studio.test_ending import wait_for_address

mcp = pytest.importorskip("mcp", reason="needs the extra mcp")
HELLO = {
    "jsonrpc": "2.0", "id": 1, "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}},
}  # fmt: skip
WANTED = {"Accept": "application/json, text/event-stream"}
SMALL = {"prompt": "a fox", "width": 64, "height": 64, "steps": 3}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A server without users, with a model of images and one of clips, the page and the tools."""
    out, fake = tmp_path_factory.mktemp("mcp"), FakePipeline()
    engine = Engine(
        {"fake": "x", "clips": "y"},
        out,
        device="cpu",
        load=lambda source: fake if source == "x" else tiny_video_pipeline(),
        server_limits=ServerLimits(streams_per_user=2),
    )
    for key in ("fake", "clips"):
        engine.model(key).result(60)
    with serving(engine) as served:
        served.pipe = fake
        yield served


@contextmanager
def serving(engine, table=None):
    """Serve page, API and tools."""
    app = create_app(engine, table, ("127.0.0.1", "localhost"), uploads=UPLOADS, forms=FORMS)
    add_mcp(app, engine, has_users=table is not None)
    mount(app, engine, table)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    try:
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", engine=engine, out=engine.output_dir)
    finally:
        server.should_exit = True
        engine.close()


@asynccontextmanager
async def session_of(address, headers=None):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async with (
        httpx.AsyncClient(trust_env=False, headers=headers or {}, timeout=60) as client,
        streamable_http_client(f"{address}/mcp", http_client=client) as (reading, writing, *_),
        ClientSession(reading, writing, read_timeout_seconds=timedelta(seconds=60)) as session,
    ):
        session.told = await session.initialize()
        yield session


def with_session(served, work, headers=None):
    """Run a coroutine with a session."""

    async def main():
        async with session_of(served.address, headers) as session:
            return await work(session)

    return asyncio.run(main())


async def ask(session, tool, **arguments):
    """Call a tool that works; returns its values and its images."""
    answer = await session.call_tool(tool, arguments)
    assert not answer.isError, answer.content
    text, *images = answer.content
    return json.loads(text.text), images


async def refusal(session, tool, **arguments):
    """Call a tool that refuses; returns what it says."""
    answer = await session.call_tool(tool, arguments)
    assert answer.isError, answer.content
    return answer.content[0].text


# ----------------------------------------------------------------------------- what it is


def test_tools_say_what_they_take_with_the_ranges_of_the_requests(local):
    async def work(session):
        return session.told, (await session.list_tools()).tools

    told, tools = with_session(local, work)
    assert told.serverInfo.name == "tessera"
    assert "list_models" in told.instructions
    found = {tool.name: tool for tool in tools}
    assert set(found) == {
        "list_models", "generate_image", "generate_video", "upscale_image", "describe_image", "job_status", "stop_job"
    }  # fmt: skip
    options = TextToImageRequest.model_json_schema()["properties"]
    schema = found["generate_image"].inputSchema
    assert schema["required"] == ["prompt"]
    for name in ("steps", "seed", "profile"):
        assert schema["properties"][name]["anyOf"] == options[name]["anyOf"]
    assert schema["properties"]["prompt"]["maxLength"] == options["prompt"]["maxLength"]
    for tool in tools:
        assert tool.description.endswith(".")
        assert tool.inputSchema["additionalProperties"] is False
        assert all(one.get("description") for one in tool.inputSchema["properties"].values()), tool.name
        assert "format" not in json.dumps(tool.inputSchema)  # nothing takes a file or an address
        assert "request" not in tool.inputSchema["properties"]


def test_an_image_comes_with_its_settings_and_is_the_file(local):
    async def work(session):
        values, images = await ask(session, "generate_image", **SMALL, seed=5, negative_prompt="rain", model="fake")
        (row,) = values["images"]
        return values, row, images, await ask(session, "describe_image", name=row["name"])

    values, row, (image,), (described, no_images) = with_session(local, work)
    assert values["state"] == "done"
    file = local.out / row["name"]
    assert (image.mimeType, base64.b64decode(image.data)) == ("image/png", file.read_bytes())
    settings = read_picture(file)
    assert (settings.prompt, settings.seed, settings.steps, settings.negative_prompt) == ("a fox", 5, 3, "rain")
    assert described == {"name": row["name"], "settings": row["settings"]}
    assert no_images == []
    assert parse(json.dumps(row["settings"])) == settings  # nothing that repeats the image is left out
    assert httpx.get(row["address"], trust_env=False).content == file.read_bytes()
    assert local.engine.job(values["job_id"]).owner == "local"


def test_a_larger_version_is_the_same_image(local):
    async def work(session):
        values, _ = await ask(session, "generate_image", **SMALL, seed=6)
        large, images = await ask(session, "upscale_image", name=values["images"][0]["name"], upscale=2)
        return large["images"][0], images[0]

    row, image = with_session(local, work)
    assert (row["settings"]["seed"], row["settings"]["upscale"]) == (6, 2)
    with Image.open(io.BytesIO(base64.b64decode(image.data))) as large:
        assert large.size == (128, 128)


def test_a_video_has_the_length_nearest_to_what_was_asked_for(local):
    async def work(session):
        row = (await ask(session, "generate_video", prompt="a fox", seconds=0.5, fps=10, seed=1))[0]["images"][0]
        return row, await refusal(session, "generate_video", prompt="a fox", model="fake")

    row, refused = with_session(local, work)
    assert (row["settings"]["model"], row["settings"]["frames"], row["settings"]["fps"]) == ("clips", 5, 10)
    assert httpx.get(row["video"], trust_env=False).headers["content-type"] == "video/mp4"
    assert refused == "The model 'fake' generates images, not videos; choose among clips."


def test_a_long_job_is_waited_for_in_parts_and_stopped(local):
    shares = []

    async def tell(share, total, message):
        shares.append((share, total, message))

    async def work(session):
        local.pipe.step_seconds = 0.02
        asked = {**SMALL, "steps": 200, "wait_seconds": 0.3}
        answer = await session.call_tool("generate_image", asked, progress_callback=tell)
        begun = json.loads(answer.content[0].text)
        status, _ = await ask(session, "job_status", job_id=begun["job_id"], wait_seconds=0.2)
        other, _ = await ask(session, "generate_image", **{**asked, "wait_seconds": 0})
        waits = await asyncio.gather(
            *(session.call_tool("job_status", {"job_id": begun["job_id"], "wait_seconds": 0.5}) for _ in range(3))
        )
        ended, _ = await ask(session, "stop_job", job_id=begun["job_id"])
        local.pipe.step_seconds = 0
        last = await ask(session, "job_status", job_id=other["job_id"], wait_seconds=30)
        return begun, status, other, waits, ended, last

    try:
        begun, status, other, waits, ended, (last, images) = with_session(local, work)
    finally:
        local.pipe.step_seconds = 0
    assert begun["state"] == status["state"] == "running"
    assert 0 < begun.get("progress", 0) < status["progress"] < 1
    assert (other["state"], other["ahead"]) == ("queued", 1)
    assert shares
    assert all(0 <= share < total == 1 and "step" in message for share, total, message in shares)
    assert [answer.isError for answer in waits].count(True) == 1  # as many wait as one may
    assert ended == {"job_id": begun["job_id"], "state": "stopped"}
    assert (last["state"], len(images)) == ("done", 1)


FOX = {"prompt": "a fox"}
NO_MODEL = "There is no such model here; choose among fake, clips."
NO_IMAGE = "There is no such image; give a name that generate_image or job_status has returned."
NO_JOB = "There is no such job; give the id that generate_image or generate_video has returned."


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("generate_image", {**FOX, "model": "nope"}, NO_MODEL),
        ("generate_video", {**FOX, "model": "nope", "seconds": 1}, NO_MODEL),
        ("generate_image", {**FOX, "steps": 5000}, "steps: choose 1 to 200"),
        ("generate_image", {**FOX, "seed": -1}, "seed: choose 0 to 4294967295"),
        ("generate_image", {**FOX, "steps": "many"}, "steps: choose a whole number, 1 to 200"),
        ("generate_image", {**FOX, "width": 64}, "request: height and width go together; give both or neither."),
        ("generate_image", {"prompt": " "}, "prompt: the prompt is empty; say what to generate."),
        ("generate_image", {}, "prompt: is missing; give a text of at most 2000 characters"),
        ("job_status", {"job_id": "0" * 16, "path": "/x"}, "'path': job_status has no such setting; leave it out"),
        ("generate_image", {**FOX, "wait_seconds": 999}, "wait_seconds: choose 0 to 300"),
        ("generate_video", {**FOX, "seconds": 200}, "seconds: choose a number above 0, at most 32.125 (257 frames)."),
        ("describe_image", {"name": "../../../etc/passwd"}, NO_IMAGE),
        ("describe_image", {"name": "http://127.0.0.1/x.png"}, NO_IMAGE),
        ("upscale_image", {"name": ".tessera/jobs.sqlite", "upscale": 2}, NO_IMAGE),
        ("upscale_image", {"upscale": 2}, "name: is missing"),
        ("job_status", {"job_id": "0" * 16}, NO_JOB),
        ("job_status", {"job_id": "../x"}, "job_id: is not of the accepted form; see the schema of job_status"),
        ("nothing", {}, "There is no such tool; choose among list_models, generate_image, generate_video, "
         "upscale_image, describe_image, job_status, stop_job."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_as_everywhere(local, tool, arguments, said):
    async def work(session):
        return await refusal(session, tool, **arguments)

    before = len(local.engine.jobs())
    assert with_session(local, work) == said
    assert len(local.engine.jobs()) == before


def test_an_error_of_a_job_is_the_answer_and_one_of_ours_names_nothing(local, monkeypatch):
    async def work(session):
        failed = await refusal(session, "generate_image", **{**SMALL, "width": 72})
        monkeypatch.setattr(type(local.engine), "ahead", None)
        monkeypatch.setattr(type(local.engine), "job", lambda *_: (_ for _ in ()).throw(OSError("/secret/path")))
        return failed, await refusal(session, "job_status", job_id="0" * 16)

    failed, unknown = with_session(local, work)
    assert failed == "width=72 is not usable: expected a multiple of 16."
    assert unknown == "Something went wrong; the log of the server says what."


def test_large_images_are_shown_smaller_and_marked(tmp_path, monkeypatch):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8))
    settings = parse(json.dumps({"seed": 1, "height": 600, "width": 900, "model": "fake", "fingerprint": "0" * 16}))
    path = save_picture(noise, tmp_path / "noise.png", settings)
    kind, data = fitting(Shown(path, settings), 200_000)
    assert kind == "image/jpeg"
    assert len(data) <= 200_000 < path.stat().st_size
    with Image.open(io.BytesIO(data)) as view:
        assert view.size == (512, 341)
    assert b"trainedAlgorithmicMedia" in data  # generated, as its metadata say
    assert fitting(Shown(path, settings), path.stat().st_size) == ("image/png", path.read_bytes())
    monkeypatch.setattr(answers, "MAX_SHOWN", 2)
    told = answers.content(answers.Answer({"a": 1}, [Shown(path, settings)] * 3))
    assert [block.type for block in told] == ["text", "image", "image"]
    assert sum(len(block.data) for block in told[1:]) <= answers.MAX_ANSWER_BYTES * 4 / 3 + 8


# -------------------------------------------------------------------------------- hostile


def post(served, path="/mcp", **headers):
    return httpx.post(f"{served.address}{path}", json=HELLO, headers={**WANTED, **headers}, trust_env=False)


def test_only_messages_of_this_machine_are_answered(local):
    assert post(local).status_code == post(local, "/mcp/").status_code == 200
    assert post(local, Host="evil.example").status_code == 400  # DNS rebinding
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": local.address.replace("127.0.0.1", "localhost")},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert post(local, **headers).status_code == 403, headers
    assert post(local, Origin=local.address).status_code == 200
    plain = {**WANTED, "Content-Type": "text/plain"}
    as_form = httpx.post(f"{local.address}/mcp", content=json.dumps(HELLO), headers=plain, trust_env=False)
    assert as_form.status_code == 400  # what a form of any page can send
    large = {**HELLO, "params": {"x": "y" * 300_000}}
    assert httpx.post(f"{local.address}/mcp", json=large, headers=WANTED, trust_env=False).status_code == 413
    for name in ("access-control-allow-origin", "set-cookie"):
        assert name not in post(local).headers


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/mcp/", "gradio_api/mcp/sse", "gradio_api/mcp/schema", "gradio_api/mcp/messages/", "gradio_api/info",
        "gradio_api/upload", "gradio_api/file=/etc/passwd", "gradio_api/queue/join", "gradio_api/queue/data",
        "gradio_api/run/generate_image", "gradio_api/call/generate_image", "gradio_api/api/generate_image", "config",
        "sse", "schema", "messages/", "http", "..%2fgradio_api/info", "mcp",
    ],
)  # fmt: skip
def test_nothing_else_of_gradio_is_there(local, method, path):
    with httpx.Client(base_url=local.address, trust_env=False) as client:
        assert client.request(method, f"/mcp/{path}", headers=WANTED).status_code == 404
        assert client.request(method, f"/gradio_api/mcp/{path}", headers=WANTED).status_code == 404


@pytest.mark.parametrize("accept", ["text/html", "text/event-stream", "*/*"])
def test_it_has_no_page_and_no_stream_to_listen_to(local, accept):
    for method in ("GET", "HEAD", "DELETE", "PUT", "OPTIONS"):
        answer = httpx.request(method, f"{local.address}/mcp", headers={"Accept": accept}, trust_env=False)
        assert answer.status_code == 405, method
        assert answer.headers["allow"] == "POST"


def test_users_send_a_token_with_each_request_and_see_only_what_is_theirs(tmp_path):
    (tmp_path / "out").mkdir()
    roles = {"ann": "generate", "bob": "generate", "eve": "view", "root": "admin"}
    tokens = {name: add_user(tmp_path / "users.json", name, role) for name, role in roles.items()}
    engine = Engine({"fake": "x"}, tmp_path / "out", device="cpu", load=lambda source: FakePipeline())
    with serving(engine, TokenTable(tmp_path / "users.json")) as served:
        served.tokens = tokens
        assert post(served).status_code == 401
        assert post(served, Authorization="Bearer wrong").status_code == 401
        with httpx.Client(base_url=served.address, trust_env=False) as client:
            client.post("/login", data={"username": "ann", "password": tokens["ann"]})
            assert client.get("/").status_code == 200
            assert client.post("/mcp", json=HELLO, headers=WANTED).status_code == 401  # a cookie is not enough

        async def of_ann(session):
            return (await ask(session, "generate_image", **SMALL))[0]

        made = with_session(served, of_ann, bearer(served, "ann"))
        name, job = made["images"][0]["name"], made["job_id"]
        assert engine.job(job).owner == "ann"

        async def of_others(session):
            calls = [("describe_image", {"name": name}), ("job_status", {"job_id": job}), ("stop_job", {"job_id": job}),
                     ("upscale_image", {"name": name, "upscale": 2})]  # fmt: skip
            return [(await session.call_tool(tool, arguments)) for tool, arguments in calls]

        for answer in with_session(served, of_others, bearer(served, "bob")):
            assert answer.isError
            assert "There is no such" in answer.content[0].text
        said = [answer.content[0].text for answer in with_session(served, of_others, bearer(served, "eve"))]
        assert sum("This needs the role 'generate'; yours is 'view'." in one for one in said) == 2
        assert not any(answer.isError for answer in with_session(served, of_others, bearer(served, "root"))[:2])

        async def of_eve(session):
            return await refusal(session, "generate_image", prompt="a fox"), await ask(session, "list_models")

        refused, (models, _) = with_session(served, of_eve, bearer(served, "eve"))
        assert "role 'generate'" in refused
        assert [row["name"] for row in models["models"]] == ["fake"]


# --------------------------------------------------------------------------------- command


def test_without_the_option_there_is_nothing_at_its_address(tmp_path):
    (tmp_path / "out").mkdir()
    engine = Engine({"fake": "x"}, tmp_path / "out", device="cpu", load=lambda source: FakePipeline())
    app = create_app(engine, None, uploads=UPLOADS, forms=FORMS)
    mount(app, engine)
    port = check_port("127.0.0.1", 0)
    server = _start(app, "127.0.0.1", port)
    try:
        served = SimpleNamespace(address=f"http://127.0.0.1:{port}")
        for path in ("/mcp", "/mcp/", "/gradio_api/mcp", "/gradio_api/mcp/", "/zh/gradio_api/mcp/"):
            assert post(served, path).status_code == 404, path
            assert httpx.get(f"{served.address}{path}", headers=WANTED, trust_env=False).status_code == 404, path
    finally:
        server.should_exit = True
        engine.close()


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    found = serve.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "mcp" else found(name))
    with pytest.raises(ImportError, match=r"tessera\[mcp\]"):
        serve.run([], mcp=True, output_dir=tmp_path, port=0)
    monkeypatch.delattr(GradioMCPServer, "StreamableHTTPSessionManager")  # another mcp than Gradio's server needs
    engine = Engine({"fake": "x"}, tmp_path, device="cpu", load=lambda source: FakePipeline())
    with pytest.raises(MissingMcpError, match=r"tessera\[mcp\]"):
        add_mcp(create_app(engine), engine, has_users=False)
    engine.close()


def test_other_machines_reach_it_with_tokens_only(tmp_path):
    for command in ("studio", "serve"):
        told = CliRunner().invoke(command_line, [command, "--mcp", "--host", "0.0.0.0", "--output", str(tmp_path)])
        assert told.exit_code != 0
        assert "--auth-file" in str(told.exception) + told.output


def test_the_command_serves_it_and_ends_while_somebody_waits(tmp_path):
    tiny_text_to_image_pipeline().save_pretrained(tmp_path / "tiny")
    command = ["-m", "apps", "studio", "--mcp", "--no-browser", "--model", tmp_path / "tiny", "--port", "0"]
    process = Python(*command, "--device", "cpu", "--output", tmp_path / "out")
    out, err = process.files
    try:
        address = wait_for_address(process, out)

        async def main():
            async with session_of(address) as session:
                values, images = await ask(session, "generate_image", prompt="a fox", steps=2)
                waiting = asyncio.ensure_future(session.call_tool("generate_image", {"prompt": "a fox", "steps": 200}))
                await ask(session, "job_status", job_id=values["job_id"])  # by now the other one is under way
                process.send_signal(signal.SIGINT)
                await asyncio.wait({waiting}, timeout=2)  # the client tries to come back, for ever
                waiting.cancel()
                return values, images

        values, images = asyncio.run(main())
        assert process.wait(60) in (0, 130)
    finally:
        process.kill()
    assert values["images"][0]["settings"]["model"] == "tiny"
    assert len(images) == 1
    assert "MCP at /mcp" in out.read_text()
    told = err.read_text()
    assert "Traceback" not in told, told
    assert "a fox" not in told + out.read_text()  # what people ask for stays out of the log
