"""Install the project into the environment that runs this, and say meanwhile what is going on.

`.venv/bin/python -m tools.install studio,train` from the project's folder; the Makefile calls it. It chooses where
torch comes from (tools/torch_index.py), runs pip under constraints.txt and tells its output as one line a package.
pip's errors are shown whole, and all that it writes is kept in install.log of the environment.
"""

from __future__ import annotations

import importlib.metadata
import os
import queue
import shlex
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import IO

from tools.pip_progress import Progress, pinned
from tools.torch_index import (
    ACCEPTED,
    VARIABLE,
    Choice,
    UnsuitableError,
    choose,
    make_probe,
    read_pip_settings,
    this_machine,
    without_password,
)

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
SILENCE_SECONDS = 10.0
"""After so long without a line of pip's, say what is going on."""
REMEDIES = {
    "Retrying (": "look at the network and the proxy (HTTPS_PROXY, or PIP_INDEX_URL for a mirror), then run it again: "
    "what is downloaded is kept",
    "No space left": "free some space: about 2 GB are needed, 8 GB with CUDA; TMPDIR=/another/folder moves what is "
    "only needed meanwhile",
    "No matching distribution": "look at the versions that pip names above; wheels exist for Linux (glibc 2.28 or "
    "newer) on x86-64 and arm64 and for macOS 14 or newer on Apple silicon, Python 3.11 to 3.14",
    "CERTIFICATE_VERIFY_FAILED": "name your proxy's certificates: PIP_CERT=/path/to/certificates.pem",
    "Read timed out": "the network is slow: run it again with PIP_DEFAULT_TIMEOUT=120; what is downloaded is kept",
    "externally-managed": "use the environment of this folder: make studio, or make PYTHON=/path/to/python3.11",
}
REMEDY = (
    "run it again (what is downloaded is kept), after make clean to begin anew; or choose where torch comes from: "
    + ACCEPTED
)


def main(arguments: list[str]) -> int:
    """Install; the exit status.

    Args:
        arguments: one, the extras of pyproject.toml with commas between them.
    """
    if len(arguments) != 1:
        return _fail(f"expected the extras as one argument, such as studio,train; got {arguments}", 2)
    extras = arguments[0].split(",")
    try:
        settings = read_pip_settings()
        override = os.environ.get(VARIABLE, "").strip()
        choice = choose(this_machine(), override, settings, make_probe(settings))
    except UnsuitableError as error:
        return _fail(str(error), 2)
    progress = Progress(len(pinned(CONSTRAINTS.read_text(encoding="utf-8"), set(extras))))
    say(f"installing tessera with {', '.join(extras)} into {sys.prefix}: about {progress.total} packages")
    say(f"torch: {choice.reason}\n     (to choose otherwise: {ACCEPTED})")
    started = time.monotonic()
    log = Path(sys.prefix) / "install.log"
    command = pip_command(extras, choice, _pip_version())
    status, errors = follow(command, progress, log)
    if status != 0:
        shown = shlex.join(without_password(word) if "://" in word else word for word in command)
        return _fail(f"pip failed with status {status}. Remedy: {remedy(errors)}. Log: {log}. Command: {shown}", status)
    say(f"installed: torch {_version('torch')}, {progress.summary(time.monotonic() - started)}")
    return 0


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return status


def pip_command(extras: list[str], choice: Choice, pip: tuple[int, int]) -> list[str]:
    """Return the command line of pip; its own settings, files and PIP_* variables, hold beside it.

    Args:
        extras: of pyproject.toml.
        choice: an index to search too.
        pip: its version; from 24.1 on it can tell how far a download is, in lines.
    """
    # Without pip's --log: with it, the output of a failed build goes there and not into the error.
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--progress-bar", "raw" if pip >= (24, 1) else "off"]
    if choice.index:
        command += ["--extra-index-url", choice.index]
    return [*command, "--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[{','.join(extras)}]"]


def follow(command: list[str], progress: Progress, log: Path) -> tuple[int, str]:
    """Run pip, show its progress and its errors; its exit status and what it wrote to stderr.

    Args:
        command: of pip.
        progress: reads its lines.
        log: receives all that pip writes.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PIP_QUIET": "0", "PIP_VERBOSE": "0", "PIP_NO_COLOR": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    )
    lines: queue.Queue[tuple[str, str]] = queue.Queue()
    readers = [
        threading.Thread(target=_pump, args=(name, stream, lines), daemon=True)
        for name, stream in (("out", process.stdout), ("error", process.stderr))
        if stream is not None
    ]
    before = _installed()
    for reader in readers:
        reader.start()
    errors: list[str] = []
    started = shown = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        while any(reader.is_alive() for reader in readers) or not lines.empty():
            try:
                name, line = lines.get(timeout=0.5)
            except queue.Empty:
                name, line = "", ""
            file.write(line)
            if name == "error":
                errors.append(line)
                sys.stderr.write(line)
                sys.stderr.flush()
            told = progress.read(line) if name == "out" else ""
            if not told and time.monotonic() - shown > SILENCE_SECONDS:
                told = f"     {progress.waiting(_installed() - before)}, {time.monotonic() - started:.0f} s"
            if told:
                say(told)
                shown = time.monotonic()
    return process.wait(), "".join(errors)


def _pump(name: str, stream: IO[str], lines: queue.Queue[tuple[str, str]]) -> None:
    for line in stream:
        lines.put((name, line))


def _installed() -> int:
    """How many packages lie in the environment, counted by the last file that pip writes of each."""
    folders = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    return sum(1 for folder in folders for _ in folder.glob("*.dist-info/RECORD"))


def remedy(errors: str) -> str:
    """Return what to do about what pip wrote to stderr."""
    return next((advice for sign, advice in REMEDIES.items() if sign in errors), REMEDY)


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _pip_version() -> tuple[int, int]:
    major, minor = _version("pip").split(".")[:2]
    return int(major), int(minor)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted; run it again, what is downloaded is kept", 130))
