"""Eight clients at once for five minutes: no error, no image or seed of another, and no memory lost."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
from PIL import Image

PROJECT = Path(__file__).resolve().parents[2]
CLIENTS, SECONDS = 8, 300
THINGS = ("fox", "pizza", "ghost", "rocket", "octopus", "crown", "panda", "donut")


def start(folder, log):
    command = [sys.executable, "-m", "apps", "serve", "--port", "0", "--device", "cpu", "--output", str(folder / "out")]
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, cwd=PROJECT)
    deadline = time.monotonic() + 150
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process, found[0]


def client(number, address, until, told):
    """Ask for the same two images again and again: they must be the same each time, and nobody else's."""
    wishes = [{"prompt": f"a {THINGS[number]}", "seed": 100 * number + i, "steps": 4} for i in range(2)]
    first = {}
    with httpx.Client(base_url=address, trust_env=False, timeout=120) as http:
        while time.monotonic() < until:
            for wish in wishes:
                answer = http.post("/v1/images/generations", json=wish)
                if answer.status_code != 200:
                    told.append(f"client {number}: {answer.status_code} {answer.text[:200]}")
                    return
                (row,) = answer.json()["data"]
                with Image.open(io.BytesIO(base64.b64decode(row["b64_json"]))) as image:
                    digest = hashlib.sha256(image.tobytes()).hexdigest()
                if (row["seed"], row["revised_prompt"]) != (wish["seed"], wish["prompt"]):
                    told.append(f"client {number}: asked for {wish}, got {row['seed']} {row['revised_prompt']}")
                if first.setdefault(wish["seed"], digest) != digest:
                    told.append(f"client {number}: another picture for {wish}")
                told.done += 1


class Told(list):
    done = 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_clients(tmp_path, record_property):
    process, address = start(tmp_path, tmp_path / "log")
    try:
        httpx.post(f"{address}/v1/images/generations", json={"prompt": "a fox"}, timeout=120, trust_env=False)
        until, told = time.monotonic() + SECONDS, Told()
        threads = [threading.Thread(target=client, args=(i, address, until, told)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        memory, server = [], psutil.Process(process.pid)
        while any(thread.is_alive() for thread in threads):
            memory.append(server.memory_info().rss / 2**20)
            time.sleep(1)
        early, late = (statistics.median(part) for part in (memory[60:120], memory[-60:]))
        record_property("pictures", told.done)
        record_property("mebibytes", (round(early), round(late)))
        assert told == []
        assert told.done > CLIENTS
        assert late < early * 1.05 + 10
        assert process.poll() is None
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.terminate()  # and not SIGINT, which is ignored by what a shell starts in the background
        process.wait(60)
