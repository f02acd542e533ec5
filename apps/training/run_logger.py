"""The log of a run: a progress bar with ETA, `log.jsonl`, and TensorBoard events if asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunLogger:
    """Log one run; silent on all but the first process.

    Args:
        folder: Folder of the run; `log.jsonl` is appended to.
        total_steps: Length of the progress bar.
        step: Steps already taken; later lines of the log belong to a part that is being repeated and are dropped.
        active: Whether this is the process that logs.
        tensorboard: Also write TensorBoard events.
    """

    def __init__(self, folder: Path, total_steps: int, step: int, active: bool, tensorboard: bool) -> None:
        self.active = active
        self.path = folder / "log.jsonl"
        self.console = Console(stderr=True, quiet=not active)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(
            *columns,
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (active and self.console.is_terminal),
        )
        self.bar = self.progress.add_task("starting", total=total_steps, completed=step)
        self.events = _event_writer(folder) if tensorboard and active else None
        if active:
            self._drop_after(step)

    def __enter__(self) -> "RunLogger":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.events is not None:
            self.events.close()

    def message(self, message: str) -> None:
        """Show one line above the progress bar."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.progress.update(self.bar, completed=step)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Add one line to the log: `{"kind": ..., "step": ..., **values}`."""
        if not self.active:
            return
        entry = {"kind": kind, "step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if kind == "train":
            brief = f"loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s"
            self.progress.update(self.bar, description=brief)
        if kind != "train" or not self.console.is_terminal:
            self.message(f"step {step} {kind}: {shown}")
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(f"{kind}/{name}", value, step)

    def _drop_after(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept = [entry for entry in read_log(self.path) if entry["step"] <= step and step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        temporary.replace(self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's `log.jsonl`; a last line that a kill has cut off is left out.

    Raises:
        ValueError: A line is no JSON.
    """
    *whole, _ = path.read_text(encoding="utf-8").split("\n")  # what follows the last line end is cut off, or nothing
    return [json.loads(line) for line in whole]


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError("run.tensorboard = true needs TensorBoard: pip install 'tessera[train]'") from error
    return SummaryWriter(str(folder / "tensorboard"))
