"""Load a server from all sides at once and report how it holds.

    python -m tests.studio.load --seconds 300 --output docs/results/server_load.json

Eight clients generate images without a pause, fifty readers of event streams read a few bytes a second, 24 uploads of
4096 x 4096 pixels run in parallel again and again, and meanwhile a probe asks for the server's health twenty times a
second. Reported are the longest and the median answer of the probe, errors, and the server's memory: idle with the
model loaded, and at most.
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from apps.api.tokens import add_user

PROJECT = Path(__file__).resolve().parents[2]
CLIENTS, READERS, UPLOADS = 8, 50, 24
SIDE = 4096
DECODED_MIB = SIDE * SIDE * 4 / 2**20
"""Of one decoded image with transparency."""


@dataclass
class Report:
    """What was measured.

    Attributes:
        seconds: of load.
        images: generated.
        uploads: taken.
        stream_bytes: that slow readers got.
        health_max: seconds of the slowest answer of the probe.
        health_median: of the usual one.
        health_answers: how many there were.
        idle_mib: memory with the model loaded.
        most_mib: memory at most.
        bound_mib: twice the idle value and one decoded image a core.
        problems: answers that should not have come, and how often.
    """

    seconds: float = 0.0
    images: int = 0
    uploads: int = 0
    stream_bytes: int = 0
    health_max: float = 0.0
    health_median: float = 0.0
    health_answers: int = 0
    idle_mib: float = 0.0
    most_mib: float = 0.0
    bound_mib: float = 0.0
    problems: Counter = field(default_factory=Counter)


class Load:
    """The clients of one run."""

    def __init__(self, address: str, tokens: list[str], seconds: float) -> None:
        self.address = address
        self.heads = [{"Authorization": f"Bearer {token}"} for token in tokens]
        self.until = time.monotonic() + seconds
        self.report = Report(seconds=seconds)
        self.lock = threading.Lock()

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.until

    def note(self, problem: str) -> None:
        with self.lock:
            self.report.problems[problem] += 1

    def generate(self, number: int) -> None:
        """Generate images without a pause."""
        with httpx.Client(base_url=self.address, trust_env=False, timeout=300, headers=self.heads[number]) as client:
            for seed in itertools.count(1000 * number):
                if not self.goes_on:
                    return
                body = {"prompt": "a fox on blue", "seed": seed, "steps": 8}
                answer = client.post("/v1/images/generations", json=body)
                if answer.status_code != 200 or answer.json()["data"][0]["seed"] != seed:
                    self.note(f"generate: {answer.status_code} {answer.text[:80]}")
                else:
                    with self.lock:
                        self.report.images += 1

    def read_slowly(self, number: int) -> None:
        """Follow a long job, a few bytes a second."""
        head = self.heads[number % CLIENTS]
        port = int(self.address.rsplit(":", 1)[1])
        with httpx.Client(base_url=self.address, trust_env=False, timeout=300, headers=head) as client:
            while self.goes_on:
                rows = client.get("/v1/jobs", params={"limit": 1}).json()["jobs"]
                if not rows:
                    time.sleep(0.2)
                    continue
                with socket.socket() as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                    one.connect(("127.0.0.1", port))
                    lines = [f"GET /v1/jobs/{rows[0]['id']}/events HTTP/1.1", f"Host: 127.0.0.1:{port}",
                             f"Authorization: {head['Authorization']}"]  # fmt: skip
                    one.sendall("\r\n".join([*lines, "", ""]).encode())
                    one.settimeout(2)
                    opened = time.monotonic()
                    while self.goes_on and time.monotonic() - opened < 20:
                        try:
                            part = one.recv(256)
                        except (TimeoutError, ConnectionResetError):
                            break
                        if not part:
                            break
                        with self.lock:
                            self.report.stream_bytes += len(part)
                        time.sleep(0.5)

    def upload(self, number: int, content: bytes) -> None:
        """Hand in a large image again and again."""
        head = self.heads[number % CLIENTS]
        with httpx.Client(base_url=self.address, trust_env=False, timeout=600, headers=head) as client:
            while self.goes_on:
                answer = client.post("/v1/pictures", content=content)
                if answer.status_code != 201:
                    self.note(f"upload: {answer.status_code} {answer.text[:80]}")
                else:
                    with self.lock:
                        self.report.uploads += 1


def probe(port: int, seconds: float, told: multiprocessing.connection.Connection) -> None:
    """Ask how the server is, twenty times a second, each time over a new connection, as monitors do.

    A process of its own, so that it measures the server and not the clients beside it.
    """
    until, times, problems = time.monotonic() + seconds, [], Counter()
    while time.monotonic() < until:
        begun = time.monotonic()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/v1/health")
            answer = connection.getresponse()
            if answer.status != 200:
                problems[f"health: {answer.status} {answer.read(80)!r}"] += 1
            connection.close()
        except OSError as error:
            problems[f"health: {type(error).__name__}"] += 1
        times.append(time.monotonic() - begun)
        time.sleep(0.05)
    told.send((times, problems))


def large_image(number: int) -> bytes:
    """Return a PNG of 4096 x 4096 pixels with transparency, different for each number."""
    ramp = np.arange(SIDE, dtype=np.uint32)
    values = np.stack([np.add.outer(ramp * (channel + 1), ramp * (number + 1)) >> 4 for channel in range(4)], -1)
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8), "RGBA").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def run(seconds: float, folder: Path) -> Report:
    """Start a server, load it and stop it.

    Args:
        seconds: of load.
        folder: for its files.
    """
    tokens = [add_user(folder / "users.json", f"user{number}") for number in range(CLIENTS)]
    log = folder / "log"
    command = [sys.executable, "-m", "apps", "serve", "--port", "0", "--device", "cpu", "--no-page",
               "--auth-file", str(folder / "users.json"), "--output", str(folder / "out")]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=PROJECT)
    contents = [large_image(number) for number in range(UPLOADS)]
    try:
        deadline = time.monotonic() + 150
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server did not start: {log.read_text()}")
            time.sleep(0.2)
        return _load(Load(found[0], tokens, seconds), psutil.Process(process.pid), contents)
    finally:
        process.terminate()
        process.wait(60)


def _load(load: Load, server: psutil.Process, contents: list[bytes]) -> Report:
    warm = {"prompt": "a fox", "steps": 8}
    httpx.post(f"{load.address}/v1/images/generations", json=warm, headers=load.heads[0], timeout=150, trust_env=False)
    time.sleep(3)
    report = load.report
    report.idle_mib = report.most_mib = server.memory_info().rss / 2**20
    report.bound_mib = 2 * report.idle_mib + DECODED_MIB * (psutil.cpu_count() or 1)
    load.until = time.monotonic() + report.seconds
    threads = [threading.Thread(target=load.generate, args=(number,)) for number in range(CLIENTS)]
    threads += [threading.Thread(target=load.read_slowly, args=(number,)) for number in range(READERS)]
    threads += [threading.Thread(target=load.upload, args=(i, content)) for i, content in enumerate(contents)]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    port = int(load.address.rsplit(":", 1)[1])
    prober = multiprocessing.get_context("spawn").Process(target=probe, args=(port, report.seconds, sender))
    prober.start()
    for thread in threads:
        thread.daemon = True
        thread.start()
    while any(thread.is_alive() for thread in threads):
        report.most_mib = max(report.most_mib, server.memory_info().rss / 2**20)
        time.sleep(0.2)
    times, problems = receiver.recv()
    prober.join()
    report.problems += problems
    report.health_answers, report.health_max, report.health_median = len(times), max(times), statistics.median(times)
    return report


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of load")
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = asdict(run(options.seconds, Path(folder)))
    machine = {"cores": psutil.cpu_count(), "system": platform.platform(), "torch": torch.__version__}
    text = json.dumps({"machine": machine, "clients": CLIENTS, "readers": READERS, "uploads at once": UPLOADS,
                       **{name: round(value, 3) if isinstance(value, float) else value
                          for name, value in report.items()}}, indent=2)  # fmt: skip
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
