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
    """

    step: int
    loss: float
    advice: str


class RunFolder:
    """A folder of a run.

    Args:
        path: the folder; its name is the run's.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.data, self.config, self.log, self.lock, self.check_lock = (
            path / part for part in ("data", "config.toml", "output.log", "lock", "check.lock")
        )
        self.training = path / path.name

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
        try:
            found = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            return Record(**{field.name: found[field.name] for field in fields(Record)})
        except (OSError, ValueError, KeyError, TypeError):
            return None

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
        log, config = self.training / "log.jsonl", self.training / "config.json"
        points = tuple(Point(line["kind"], line["step"], line["loss"]) for line in _lines(log))
        step = max((point.step for point in points), default=0)
        if step <= first or not config.is_file():
            return Progress(step, None, points)
        # The training writes its configuration right before its first step, and previews take time too.
        seconds = max(log.stat().st_mtime - config.stat().st_mtime, 0.0)
        return Progress(step, (steps - step) * seconds / (step - first), points)

    def best(self) -> Best | None:
        """Return which adapters are best so far; None before there are any."""
        try:
            found = json.loads((self.training / "best.json").read_text(encoding="utf-8"))
            return Best(int(found["step"]), float(found["loss"]), str(found["advice"]))
        except (OSError, ValueError, KeyError, TypeError):
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


def _lines(log: Path) -> list[dict[str, Any]]:
    """Read the lines of a log that may be written to at this moment: its last line may be cut."""
    try:
        text = log.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    found = [json.loads(line) for line in whole.splitlines()]
    return [line for line in found if isinstance(line.get("loss"), int | float)]


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
