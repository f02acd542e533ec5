"""Fine-tuning in a process of its own, which ends with the server; see `apps.service.tether`.

Nothing that a visitor typed is part of a command line: it names a file of settings, by a path made here.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from apps.service.request_error import RequestError
from apps.service.tethered import CODE, command_of, environment, reason_of

CHECK_SECONDS = 900.0
"""That a check may take: it loads the model and encodes all images."""
INTERRUPTED = 130
LOOK_SECONDS = 15.0
"""Between two looks at a training whether it has come to a limit."""


class FineTuningError(RequestError):
    """A fine-tuning that can't be had as it is asked for."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Files that are brought to one size.

    Attributes:
        frames: 1 of images.
        height: pixels.
        width: pixels.
        files: how many there are.
    """

    frames: int
    height: int
    width: int
    files: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a fine-tuning would do, see `apps.training.dry_run`.

    Attributes:
        buckets: files by size.
        parameters: numbers that are trained.
        layers: of the model that get adapters.
        memory: about so much is needed, MiB.
        device: where, such as `cpu`.
    """

    buckets: tuple[Bucket, ...]
    parameters: int
    layers: int
    memory: int
    device: str


class TrainingProcess:
    """A training that runs.

    Args:
        config: file of its settings.
        lock: file that is held while it runs.
        log: file that receives what it says.
        is_resumed: whether it goes on from its latest checkpoint.
        on_end: called with its exit code, in a thread of its own.
        on_look: called every `LOOK_SECONDS` while it runs, in another one.
    """

    def __init__(
        self,
        config: Path,
        lock: Path,
        log: Path,
        is_resumed: bool,
        on_end: Callable[[TrainingProcess, int], None],
        on_look: Callable[[TrainingProcess], None] | None = None,
    ) -> None:
        more = ["--resume_from_checkpoint", "latest"] if is_resumed else []
        self.is_stopping = False
        self._on_end, self._on_look = on_end, on_look
        self._started, self._ended = time.monotonic(), threading.Event()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command_of(lock, ["train-lora", str(config), *more]),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=CODE,
                env=environment(),
                start_new_session=True,  # Ctrl-C in the terminal of the server reaches it through its pipe, once
            )
        self._waiting = threading.Thread(target=self._wait, name="fine-tuning", daemon=True)
        self._waiting.start()
        threading.Thread(target=self._look, name="fine-tuning limits", daemon=True).start()

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self._started

    def stop(self) -> None:
        """Have it save a checkpoint and end; it is killed if that takes longer than `tether.GRACE_SECONDS`."""
        self.is_stopping = True
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended by itself
                self._process.stdin.close()

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended and that is on record; whether it has within so long."""
        self._waiting.join(seconds)
        return not self._waiting.is_alive()

    def _wait(self) -> None:
        code = self._process.wait()
        self._ended.set()
        self._on_end(self, code)

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            if self._on_look is not None:
                self._on_look(self)


def run_check(config: Path, lock: Path) -> CheckReport:
    """Have a process report what a training would do.

    Args:
        config: file of its settings.
        lock: file that is held meanwhile.

    Raises:
        FineTuningError: the settings can't be used, or the process failed or took too long.
    """
    command = command_of(lock, ["train-lora", str(config), "--dry-run", "--json"])
    # Its standard input stays open, see `tether`, because nothing is written to it.
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=CODE,
        env=environment(),
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    )
    found: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: found.append(_read_both(process)), daemon=True)
    reader.start()
    reader.join(CHECK_SECONDS)
    if reader.is_alive():
        process.kill()
        reader.join()
        raise FineTuningError(
            "ft.slow", f"The check took more than {CHECK_SECONDS:g} s; choose fewer files.", seconds=int(CHECK_SECONDS)
        )
    out, said = found[0]
    code = process.wait()
    if process.stdin is not None:
        process.stdin.close()
    if code != 0:
        raise failure_of(said, code, config.parent)
    return read_report(out)


def _read_both(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Read what a process says until it has ended; `communicate` would close its standard input first."""
    errors: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    stream = process.stderr
    other = threading.Thread(target=lambda: errors.append(stream.read()), daemon=True)
    other.start()
    out = process.stdout.read()
    other.join()
    return out, errors[0]


def read_report(out: str) -> CheckReport:
    """Read what `train-lora --dry-run --json` prints: a JSON object, in its last line.

    Raises:
        FineTuningError: it is of another form.
    """
    try:
        found = json.loads(out.strip().rpartition("\n")[2])
        buckets = tuple(Bucket(*(int(row[field.name]) for field in fields(Bucket))) for row in found["files"])
        memory = round(float(found["memory_mib"]["total"]))
        device = "GPU" if found["device"] == "cuda" else "CPU"
        return CheckReport(buckets, int(found["parameters"]), int(found["layers"]), memory, device)
    except (ValueError, KeyError, TypeError) as error:
        message = "The report of the check can't be read; start the training without it."
        raise FineTuningError("ft.report", message) from error


def failure_of(said: str, code: int, folder: Path) -> FineTuningError:
    """Return why a process failed; it names files of the server without their paths.

    Args:
        said: what it wrote.
        code: its exit code.
        folder: of the run.
    """
    message = reason_of(said, code, folder)
    if not message:
        return FineTuningError("ft.killed", "The system ended the process, often because memory ran out.")
    return FineTuningError("ft.failed", f"Fine-tuning failed: {message}", message=message)
