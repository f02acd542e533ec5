"""The folder of a fine-tuning run, and what can be read from its files while it is trained and afterwards.

NAME/run.json      who asked for what, and how it goes: `Record`
NAME/config.toml   the settings of `tessera train-lora`
NAME/data/         images or clips, each with its caption in a .txt
NAME/NAME/         the training's own folder: log.jsonl, previews, loras, best.json, checkpoints
NAME/cache/        what the training has encoded
NAME/output.log    what the training has said
NAME/lock          held while it is trained; check.lock while it is checked
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
"""Names of runs: part of a path and of a LoRA's name, so nothing else is in them."""
CACHE = "cache"
RESERVED = frozenset({"data", "lock", CACHE})
"""Names that no run can have, in small letters: its folder holds a folder of its own name beside these."""
STEP = re.compile(r"step-(\d+)")
State = Literal["draft", "running", "stopped", "finished", "failed"]
"""`draft`: written and checked, but not started."""


@dataclass(frozen=True, slots=True)
class Record:
    """A run, as `run.json` holds it.

    Attributes:
        name: of the run and of its LoRA.
        owner: who asked for it.
        model: key of the model among those of the server.
        steps: of the whole training.
        files: how many images or clips there are.
        trigger: the words that call for what was learnt.
        created: time of day, seconds since 1970.
        state: how it stands.
        first: step on record when the training was started last.
        reason: key of the sentence that says why it failed, without `error.`.
        message: value of that sentence; English.
    """

    name: str
    owner: str
    model: str
    steps: int
    files: int
    trigger: str
    created: float
    state: State = "draft"
    first: int = 0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """A value of a curve.

    Attributes:
        kind: "train", "validation" or "score".
        step: optimizer steps.
        loss: there.
    """

    kind: str
    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training has come.

    Attributes:
        step: optimizer steps that are on record; 0 while the model is loaded and the files are encoded.
        seconds_left: about so long until the last step; None if that isn't known yet.
        points: the curves.
    """

    step: int
    seconds_left: float | None
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Best:
    """The best adapters so far, see `apps.training.checkpoint_choice`.

    Attributes:
        step: their step.
        loss: of held-out files.
        advice: what to make of it; English.
        reason: why, for programs; empty in what earlier versions wrote.
        rise: of the loss since then, percent.
    """

    step: int
    loss: float
    advice: str
    reason: str = ""
    rise: float = 0.0


class _Losses:
    """The losses in a log that is written to: read on from where it was read last.

    Args:
        log: lines of JSON; its last line may be cut at this moment.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._end, self._last = 0, b""
        self._points: tuple[Point, ...] = ()

    def read(self) -> tuple[Point, ...]:
        """Return all losses; of a log that was cut or written anew those that it has now."""
        with self._lock:
            try:
                with self._log.open("rb") as file:
                    file.seek(self._end - len(self._last))
                    if file.read(len(self._last)) != self._last:
                        self._forget()
                        file.seek(0)
                    self._add(file.read())
            except FileNotFoundError:
                self._forget()
            return self._points

    def _add(self, data: bytes) -> None:
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            return
        self._end += len(whole)
        lines = whole.splitlines(keepends=True)
        self._last = lines[-1]
        found = [line for line in map(json.loads, lines) if isinstance(line.get("loss"), int | float)]
        self._points += tuple(Point(line["kind"], line["step"], line["loss"]) for line in found)


class RunFolder:
    """A folder of a run; what was read of it is kept as long as its files don't change.

    Args:
        path: the folder; its name is the run's.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.data, self.config, self.log, self.lock, self.check_lock = (
            path / part for part in ("data", "config.toml", "output.log", "lock", "check.lock")
        )
        self.training = path / path.name
        self._losses = _Losses(self.training / "log.jsonl")
        self._read: dict[Path, tuple[tuple[int, ...], Any]] = {}

    # ----------------------------------------------------------------- record

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run, and is not what was left of one."""
        return (self.path / "run.json").exists()

    def size(self) -> int:
        """Return how many bytes all files take; those that go meanwhile count nothing."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                with suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def record(self) -> Record | None:
        """Return what is on record; None if there is nothing that can be read."""
        found = self._json(self.path / "run.json")
        try:
            return Record(**{field.name: found[field.name] for field in fields(Record)})
        except (KeyError, TypeError):
            return None

    def _json(self, file: Path) -> Any:
        """Return what a file holds, read anew only when it has changed; None for one that can't be read."""
        try:
            status = file.stat()
            stamp = status.st_mtime_ns, status.st_size, status.st_ino
            known = self._read.get(file)
            if known is None or known[0] != stamp:
                self._read[file] = known = stamp, json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return known[1]

    def write(self, record: Record) -> Record:
        """Put a record in place of the present one, at once or not at all."""
        partial = self.path / "run.json.part"
        partial.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
        partial.replace(self.path / "run.json")
        return record

    def change(self, **values: Any) -> Record | None:
        """Change parts of the record; None if there is none."""
        record = self.record()
        return None if record is None else self.write(replace(record, **values))

    # --------------------------------------------------------------- training

    @property
    def has_checkpoint(self) -> bool:
        """Whether the training can go on from where it was."""
        return any(one.is_dir() and (one / "state.json").is_file() for one in self.training.glob("checkpoint-??????*"))

    @property
    def has_learnt(self) -> bool:
        """Whether there is anything that would be lost with the run, beside what it was made from."""
        return self.has_checkpoint or bool(self.loras())

    def progress(self, steps: int, first: int = 0) -> Progress:
        """Read the log of the training.

        Args:
            steps: of the whole training.
            first: step at which it was started last; how fast it is since then tells how long it will take.
        """
        points = self._losses.read()
        step = max((point.step for point in points), default=0)
        if step <= first:
            return Progress(step, None, points)
        try:  # the training writes its configuration right before its first step, and previews take time too
            began = (self.training / "config.json").stat().st_mtime
            seconds = max((self.training / "log.jsonl").stat().st_mtime - began, 0.0)
        except FileNotFoundError:
            return Progress(step, None, points)
        return Progress(step, (steps - step) * seconds / (step - first), points)

    def best(self) -> Best | None:
        """Return which adapters are best so far; None before there are any."""
        found = self._json(self.training / "best.json")
        try:
            said = str(found.get("reason", "")), float(found.get("rise_percent", 0))
            return Best(int(found["step"]), float(found["loss"]), str(found["advice"]), *said)
        except (AttributeError, ValueError, KeyError, TypeError):
            return None

    def preview(self) -> tuple[int, Path, list[str]] | None:
        """Return the step, the file and the prompts of the newest preview; None before there is one."""
        found = [(int(step[1]), file) for file, step in _steps(self.training / "previews", "step-*.png")]
        if not found:
            return None
        step, file = max(found)
        prompts = self.training / "previews" / "prompts.txt"
        return step, file, prompts.read_text(encoding="utf-8").splitlines() if prompts.is_file() else []

    def plot(self) -> Path | None:
        """Return the plot of all scores; None before there is one."""
        file = self.training / "loss.png"
        return file if file.is_file() else None

    def loras(self) -> dict[str, Path]:
        """Return the adapters by name: the best one by the name of the run, then each by the run and its step."""
        files = {int(step[1]): file for file, step in _steps(self.training / "loras", "step-*.safetensors")}
        best = self.best()
        named = {f"{self.name}-step-{step:06d}": file for step, file in sorted(files.items(), reverse=True)}
        return {self.name: files[best.step], **named} if best is not None and best.step in files else named

    def captions(self) -> list[str]:
        """Return the captions of the files, in the order of their names."""
        return [file.read_text(encoding="utf-8") for file in sorted(self.data.glob("*.txt"))]


def _steps(folder: Path, pattern: str) -> list[tuple[Path, re.Match[str]]]:
    return [(file, step) for file in folder.glob(pattern) if (step := STEP.fullmatch(file.stem)) is not None]


def to_toml(document: Mapping[str, Mapping[str, Any]]) -> str:
    """Write settings as TOML; those that are None are left out, because TOML has no word for it.

    Args:
        document: sections of texts, numbers, truth values, and lists of those.
    """
    lines: list[str] = []
    for section, values in document.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_value(value)}" for key, value in values.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _value(value: Any) -> str:
    """Write a value; JSON and TOML agree on these, but for the character DEL and characters beyond 16 bits."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
