"""`tessera bench training A.toml B.toml ...`: the validation loss of several runs over steps and over seconds.

The first one is what the others are compared with: how many of its steps and seconds each needs to reach its lowest
validation loss. Runs that are not finished are trained first, one after the other, those that were stopped go on;
finished ones are read from their folders. Seconds are those of training: validation, previews, saving, and what is
encoded ahead (once, for all runs on the same data) don't count.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from apps.benchmarks.next_scale import Asked
from apps.benchmarks.plot import COLOURS
from apps.commands.train import SMOKE
from apps.commands.train import run as train
from apps.environment import describe_machine
from apps.service.usage import UsageError, checking
from apps.training.checkpoint import complete_checkpoints
from apps.training.config import ConfigError, TrainConfig
from apps.training.run_logger import read_log
from apps.training.task import load_config, rehearsal

SIZE, PANEL, TOP, BOTTOM, GAP = (1100, 520), 470, 40, 60, 70  # of the chart, pixels
MIB = 2**20
SHOWN = 0.85  # of all losses on the chart; the highest, of the first steps, lie at its upper edge


@dataclass(frozen=True)
class Point:
    """A validation of a run.

    Attributes:
        step: Optimizer steps.
        seconds: Of training so far.
        loss: On held-out data.
    """

    step: float
    seconds: float
    loss: float


def bench_training(asked: Asked) -> dict[str, Any]:
    """Train what isn't trained, and compare the losses.

    Args:
        asked: `names` are the configuration files, `output` is the file beside which a chart is drawn.

    Raises:
        UsageError: No configuration, or one that can't be used, or that never validates.
    """
    if not asked.names:
        raise UsageError("tessera bench training needs configuration files: name one or more, the baseline first")
    curves, rows = {}, []
    for name in asked.names:
        config = _trained(Path(name), asked.smoke)
        if config.run.name in curves:
            raise UsageError(
                f"two configurations have run.name = {config.run.name!r}: each run needs a folder of its own"
            )
        curves[config.run.name] = read_curve(config.run.folder / "log.jsonl")
        rows.append({"run": config.run.name, **_sizes(config)})
    table = compare(rows, curves)
    if asked.output is not None:
        draw_curves(curves, asked.output.with_suffix(".png"))
    return {
        "machine": describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32),
        "tables": {f"against {next(iter(curves))}": table},
        "curves": {
            name: [{"step": one.step, "seconds": one.seconds, "loss": one.loss} for one in points]
            for name, points in curves.items()
        },
    }


def _check_same(config: TrainConfig, path: Path) -> None:
    """Check that a run was trained with the settings that its file has now.

    Raises:
        UsageError: Others were; the message names them.
    """
    was = json.loads((config.run.folder / "config.json").read_text(encoding="utf-8"))
    now = json.loads(config.model_dump_json())
    differing = [
        f"{section}.{name}"
        for section, values in now.items()
        for name, value in (values if isinstance(values, dict) else {"": values}).items()
        if (was.get(section) or {}).get(name, value) != value
    ]
    if differing:
        raise UsageError(
            f"{config.run.folder} was trained with other settings than {path} has now ({', '.join(differing)}): delete "
            "the folder, or give the file another run.name"
        )


def _trained(path: Path, smoke: bool) -> TrainConfig:
    """Train a configuration to its end, unless it has been, and return it."""
    with checking(ConfigError, OSError):
        config = load_config(path, [])
        if smoke:
            overrides = [*SMOKE, *rehearsal(config), f"run.name={config.run.name}-smoke"]
            config = load_config(path, overrides)
    found = complete_checkpoints(config.run.folder)
    if found:
        _check_same(config, path)
    if not found or int(found[-1].name.split("-")[1]) < config.run.steps:
        train(path, resume="latest" if found else None, smoke=smoke)
    return config


def read_curve(log: Path) -> list[Point]:
    """Return the validations in a run's `log.jsonl`; seconds between two lines of training are interpolated.

    Raises:
        UsageError: There is none.
    """
    lines = read_log(log)
    clock = [(0, 0.0), *((line["step"], line["seconds"]) for line in lines if line["kind"] == "train")]
    points = [
        Point(line["step"], _seconds(clock, line["step"]), line["loss"])
        for line in lines
        if line["kind"] == "validation"
    ]
    if not points:
        raise UsageError(f"{log} has no validation: set run.validate_every to a number of steps")
    return points


def _seconds(clock: Sequence[tuple[int, float]], step: int) -> float:
    """Return the time of a step between the steps whose time is known; behind them, at their mean pace."""
    for (start, before), (end, after) in itertools.pairwise(clock):
        if start <= step <= end:
            return before + (after - before) * (step - start) / (end - start)
    last, seconds = clock[-1]
    return seconds * step / last if last else 0.0


def compare(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """Return a row for each run: its lowest loss, and when it reaches that of the first one, in steps and as multiples.

    Args:
        rows: What else stands there, with "run".
        curves: Validations by run, the baseline first.
    """
    baseline = next(iter(curves.values()))
    target = min(point.loss for point in baseline)
    start = reached(baseline, target)
    table = []
    for row in rows:
        points = curves[row["run"]]
        best, found = min(point.loss for point in points), reached(points, target)
        table.append(
            {
                **row,
                "steps": points[-1].step,
                "seconds": round(points[-1].seconds, 1),
                "loss": round(best, 5),
                "loss ratio": round(best / target, 4),
                "reached at": None if found is None else round(found.step),
                "x steps": _share(found and found.step, start and start.step),
                "x seconds": _share(found and found.seconds, start and start.seconds),
            }
        )
    return table


def _share(value: float | None, of: float | None) -> float | None:
    return round(value / of, 3) if value is not None and of else None


def reached(points: Sequence[Point], target: float) -> Point | None:
    """Return when a loss was first reached, between two validations; None if it never was."""
    for number, point in enumerate(points):
        if point.loss > target:
            continue
        if number == 0:
            return point
        before = points[number - 1]
        part = (before.loss - target) / (before.loss - point.loss)
        step = before.step + part * (point.step - before.step)
        return Point(step, before.seconds + part * (point.seconds - before.seconds), target)
    return None


def _sizes(config: TrainConfig) -> dict[str, Any]:
    """Return how many parameters a run trains, and what its optimizer keeps, from its last checkpoint."""
    folder = complete_checkpoints(config.run.folder)[-1]
    states = _shapes(folder / "optimizer.safetensors")
    names = {name.rpartition("|")[0] for name in states}
    weights = _shapes(folder / "weights.safetensors")
    return {
        "parameters": sum(weights[name] for name in names),
        "state MiB": round(4 * sum(states.values()) / MIB, 2),
    }


def _shapes(file: Path) -> dict[str, int]:
    """Return the number of values of each tensor in a file."""
    with safe_open(file, "pt") as opened:
        return {name: int(torch.tensor(opened.get_slice(name).get_shape()).prod()) for name in opened.keys()}  # noqa: SIM118


def _draw_names(draw: Any, names: Sequence[str], font: Any) -> None:
    """Write the names of the curves below the panels, in their colours, as many in a row as find room."""
    x, y = GAP, SIZE[1] - 34
    for number, name in enumerate(names):
        width = round(draw.textlength(name, font))
        if x > GAP and x + width > SIZE[0]:
            x, y = GAP, y + 16
        draw.text((x, y), name, COLOURS[number % len(COLOURS)], font)
        x += width + 24


def draw_curves(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw the losses over steps and over seconds, side by side, as a PNG."""
    picture = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    losses = sorted(point.loss for points in curves.values() for point in points)
    low, high = losses[0], losses[int(SHOWN * (len(losses) - 1))]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    for panel, axis in enumerate(("step", "seconds")):
        left = GAP + panel * (PANEL + GAP)
        width, height = PANEL - 20, SIZE[1] - TOP - BOTTOM
        most = max(getattr(points[-1], axis) for points in curves.values()) or 1.0
        for tick in range(5):
            y = TOP + height * tick / 4
            draw.line([(left, y), (left + width, y)], "#dddddd")
            draw.text((left - 52, y - 8), f"{high - (high - low) * tick / 4:.4f}", "black", font)
            draw.text((left + width * tick / 4 - 8, TOP + height + 6), f"{most * tick / 4:.0f}", "black", font)
        draw.text((left, 12), f"validation loss over {axis if axis == 'seconds' else 'steps'}", "black", font)
        for number, points in enumerate(curves.values()):
            colour = COLOURS[number % len(COLOURS)]
            line = [
                (left + width * getattr(one, axis) / most, TOP + height * (high - min(one.loss, high)) / (high - low))
                for one in points
            ]
            draw.line(line, colour, 2)
            x, y = line[-1]
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
    _draw_names(draw, list(curves), font)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
