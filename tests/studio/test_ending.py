"""Ctrl-C ends a server with open event streams cleanly: they end, nothing is traced, the exit code says so."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
import uuid
from contextlib import ExitStack

import httpx
import pytest
from starlette.requests import Request

from apps.api.ending import EndingApp
from tests.fresh import Python
from tests.pipes.tiny import tiny_text_to_image_pipeline

LONG = {"prompt": "a fox", "steps": 200}


def wait_for_address(process, log, seconds=150):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        if found:
            return found[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"no address within {seconds} s: {log.read_text()}")


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM])
def test_a_server_with_open_streams_ends_cleanly(tmp_path, word):
    tiny_text_to_image_pipeline().save_pretrained(tmp_path / "tiny")
    command = ["-m", "apps", "serve", "--model", tmp_path / "tiny", "--port", "0", "--device", "cpu"]
    process = Python(*command, "--output", tmp_path / "out")
    out, err = process.files
    with ExitStack() as opened:
        opened.callback(process.kill)
        address = wait_for_address(process, out)
        client = opened.enter_context(httpx.Client(base_url=address, trust_env=False, timeout=60))

        def listen(method, path, **more):
            answer = opened.enter_context(client.stream(method, path, **more))
            lines = answer.iter_lines()
            assert answer.status_code == 200
            return lines

        page = listen("GET", f"/gradio_api/heartbeat/{uuid.uuid4().hex}")  # what each open page listens to
        next(page)
        jobs = [
            client.post("/v1/jobs", json={"task": "text_to_image", **LONG, "num_images": 16}).json()["id"] for _ in "ab"
        ]
        streams = [listen("GET", f"/v1/jobs/{job}/events") for job in jobs]
        for lines in streams:
            next(lines)
        streams.append(listen("POST", "/v1/images/generations", json={**LONG, "stream": True}))
        waiting = []
        asking = threading.Thread(
            target=lambda: waiting.append(
                httpx.post(f"{address}/v1/images/generations", json=LONG, timeout=60, trust_env=False)
            )
        )
        asking.start()
        while len(client.get("/v1/jobs").json()["jobs"]) < 4:  # until all are in the queue
            time.sleep(0.1)
        process.send_signal(word)
        assert process.wait(60) in (0, 130)
        for lines in (page, *streams):
            list(lines)  # ended, and not cut off: an answer without its end raises
        asking.join(30)
    assert waiting[0].status_code == 503
    assert waiting[0].json()["error"]["code"] in ("stopped", "shutting_down")
    told = err.read_text()
    assert "Traceback" not in told, told
    assert "Error" not in told
    assert "ending" in out.read_text()


def run(app, messages, when_to_end):
    """Call an application through `EndingApp`; returns what it sent."""
    sent = []

    async def main():
        ending = EndingApp(app)
        news = list(messages)

        async def receive():
            if news:
                return news.pop(0)
            return await asyncio.Event().wait()

        async def send(message):
            sent.append(message)
            if len(sent) == when_to_end:
                ending.ending.set()

        task = asyncio.ensure_future(ending({"type": "http"}, receive, send))
        if when_to_end == 0:
            await asyncio.sleep(0)
            ending.ending.set()
            task.cancel()
        await asyncio.wait_for(task, 10)

    asyncio.run(main())
    return sent


START = {"type": "http.response.start", "status": 200, "headers": []}
READ = {"type": "http.request", "body": b"", "more_body": False}


def test_a_stream_is_told_that_its_client_left_and_its_answer_is_finished():
    async def app(scope, receive, send):
        await receive()
        await send(START)
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    sent = run(app, [READ], 2)
    assert [message.get("more_body") for message in sent] == [None, True, None]
    assert sent[-1]["body"] == b""


def test_what_is_cancelled_before_it_answers_says_why():
    async def app(scope, receive, send):
        await receive()
        await receive()

    sent = run(app, [{"type": "http.request", "body": b"{", "more_body": True}], 0)
    assert sent[0]["status"] == 503
    assert b"shutting_down" in sent[1]["body"]


def test_an_answer_that_is_complete_stays_as_it_is():
    async def app(scope, receive, send):
        await send(START)
        await send({"type": "http.response.body", "body": b"x"})

    assert len(run(app, [READ], 1)) == 2


def test_a_cancellation_by_others_is_passed_on():
    async def app(scope, receive, send):
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(app, [], 99)


def test_who_only_looks_is_told_that_the_client_left():
    """Starlette cancels its question at once: the answer has to be there by then."""
    seen = []

    async def app(scope, receive, send):
        request = Request({**scope, "method": "POST"}, receive)
        await request.body()
        for _ in range(3):
            seen.append(await request.is_disconnected())
            await asyncio.sleep(0.01)

    run(app, [READ, {"type": "http.disconnect"}], 99)
    assert seen[-1]
