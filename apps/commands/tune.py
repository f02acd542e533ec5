"""`tessera tune`: measure what makes a model fast on this machine, and keep the best settings that reach a goal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apps.commands.shared_options import Device, Guidance, Json, ModelName, Precision, Steps
from apps.service.panels import FILES, MEASURED, OUTPUT

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from pipelines.tuning.goals import Goal
    from pipelines.tuning.progress import Progress
    from pipelines.tuning.record import Choice, TuningRecord
    from pipelines.tuning.tuner import Tuner


def tune(
    model: ModelName = "stickers",
    quality: Annotated[
        str | None,
        typer.Option(
            help="Least likeness to the plain run, mean over prompts: psnr>=30 (dB) or ssim>=0.95. Without any goal "
            "three named profiles: balanced (30 dB), faithful (40), fastest (24).",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(min=0.0, help="Most seconds of a request.", rich_help_panel=MEASURED)
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most memory of weights and work, such as 8GB; techniques that save it are measured too.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text file of prompts (or numbers of classes), one a line, at least 2; usual ones if absent. About a "
            "third are for the tables, the others verify.",
            rich_help_panel=FILES,
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time that it may take.", rich_help_panel=MEASURED)] = 10.0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            dir_okay=False,
            help="File (.json) to write and to go on from; beside the model, or in the user's cache folder, if absent.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Technique to try, such as step_cache, guidance_cache, attention; may be repeated. All if absent.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels; the model's own if absent.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels; the model's own if absent.")] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    json_output: Json = False,
    json_lines: Annotated[
        bool,
        typer.Option(
            "--json-lines",
            help="Print the progress and the result as JSON objects, one a line, instead of text.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> None:
    """Find the fastest settings of a model that reach a goal, measured on this machine."""
    from apps.commands.loading import load_for_command
    from apps.service.usage import checking
    from apps.service.writable import check_writable

    if json_output and json_lines:
        raise typer.BadParameter("--json and --json-lines are two forms of the result; give one of them")
    techniques = _techniques(only)

    if output is not None:
        check_writable(output)
    with checking():
        goals = _goals(quality, latency, memory)
    wanted = None if prompts is None else _read_prompts(prompts)
    pipe = load_for_command(model, device, dtype)
    call = _call(pipe, {"steps": steps, "guidance": guidance, "width": width, "height": height})
    if dtype == "auto":
        faster = _faster_dtype(pipe, wanted, call)
        if faster is not None:
            pipe = load_for_command(model, device, faster)
    with checking():
        tuner = _tuner(pipe, wanted, call, output, minutes)
    tuner.only = techniques
    if json_lines:
        tuner.listener = lambda progress: print_line(progress_line(progress))
        record = tuner.run(goals)
        print_line({"event": "done", **_result(record, tuner.path)})
    else:
        record = _watched(tuner, goals)
        _show(record, tuner.path, json_output)
    _check_found(record, goals)


def _goals(quality: str | None, latency: float | None, memory: str | None) -> dict[str, Goal]:
    """Return the goals by name: the one that was asked for, and those of the named profiles."""
    from pipelines.tuning.goals import Goal
    from pipelines.tuning.profiles import NAMED_GOALS

    named = {name: goal for name, goal in NAMED_GOALS.items() if memory is not None or not goal.saves_memory}
    if quality is None and latency is None and memory is None:
        return named
    asked = Goal.parse(quality, latency, memory)
    return {asked.text(): asked, **(named if asked.metric == "psnr" else {})}


def _read_prompts(file: Path) -> list[Any]:
    """Return the prompts of a file; numbers mean classes.

    Raises:
        UsageError: fewer than two.
    """
    from apps.service.prompt_file import read_text
    from apps.service.usage import UsageError

    lines = [line.strip() for line in read_text(file.read_bytes(), file.name).splitlines()]
    found = [int(line) if line.isdecimal() else line for line in lines if line and not line.startswith("#")]
    if len(found) < 2:
        raise UsageError(
            f"{file} has {len(found)} prompts; at least 2 are needed: some are learned from, others verify"
        )
    return found


def _techniques(only: Sequence[str] | None) -> frozenset[str] | None:
    """Return the techniques to try; None for all.

    Raises:
        UsageError: there is no such technique.
    """
    from apps.service.usage import UsageError
    from pipelines.tuning.candidates import TECHNIQUES

    if unknown := sorted(set(only or ()) - set(TECHNIQUES)):
        raise UsageError(f"--only is {', '.join(unknown)}; choose among {', '.join(TECHNIQUES)}")
    return frozenset(only) if only else None


def _call(pipe: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that every call is given, under the names that the pipeline has for them."""
    from pipelines import info_of

    info = info_of(pipe)
    names = {"steps": info.arguments.get("steps", "num_inference_steps"), "guidance": info.guidance_argument}
    return {names.get(name, name): value for name, value in wanted.items() if value is not None}


def _faster_dtype(pipe: Any, wanted: list[Any] | None, call: Mapping[str, Any]) -> str | None:
    """Return the other usual data type where the network is faster in it by more than what `FASTER` says."""
    from pipelines.tuning.breakdown import FASTER, other_dtype
    from pipelines.tuning.speed_up import usual_prompts_of
    from pipelines.tuning.workload import Workload

    found = other_dtype(Workload(pipe, wanted or usual_prompts_of(pipe), call))
    return found["dtype"] if found and found["ratio"] < FASTER else None


def _tuner(pipe: Any, wanted: list[Any] | None, call: Mapping[str, Any], output: Path | None, minutes: float) -> Tuner:
    """Return the tuner."""
    from pipelines.tuning.conditions import Conditions
    from pipelines.tuning.prompts import divide
    from pipelines.tuning.record import record_path
    from pipelines.tuning.speed_up import usual_prompts_of
    from pipelines.tuning.tuner import Tuner
    from pipelines.tuning.workload import Workload

    prompts = wanted or usual_prompts_of(pipe)
    learned, held_out = divide(prompts)
    path = output or record_path(pipe, Conditions.of(Workload(pipe, prompts, call)))
    return Tuner(pipe, learned, held_out, path, call, minutes)


def _watched(tuner: Tuner, goals: Mapping[str, Goal]) -> TuningRecord:
    """Tune, and show the progress with the front so far."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, transient=True, refresh_per_second=2) as live:

        def listen(progress: Progress) -> None:
            live.update(_status(progress))
            if not console.is_terminal:
                line = f"{progress.phase} {progress.done + 1}/{progress.total}, {progress.seconds_left:.0f} s left"
                console.print(f"{line}: {progress.text}", highlight=False, markup=False)

        tuner.listener = listen
        return tuner.run(goals)


def _status(progress: Progress) -> Group:
    """Return what a running tuning shows."""
    from rich.console import Group
    from rich.text import Text

    minutes, seconds = divmod(round(progress.seconds_left), 60)
    line = f"{progress.phase} {progress.done + 1}/{progress.total}, {minutes}:{seconds:02d} left: {progress.text}"
    return Group(Text(line), _table(progress.front)) if progress.front else Group(Text(line))


def _table(choices: Sequence[Choice], names: Sequence[str] = ()) -> Table:
    """Return verified settings as a table.

    Args:
        choices: in the order of the rows.
        names: of the goals that they were chosen for; () leaves the column out.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table("gain", "predicted", "likeness", "predicted", "memory", "setting")
    if names:
        table.add_column("goal")
    for number, one in enumerate(choices):
        cells = [
            f"{one.gain:.2f}x",
            f"{one.predicted_gain:.2f}x",
            _likeness(one.metric, one.quality.get(one.metric)),
            _likeness(one.metric, one.predicted_quality),
            f"{(one.memory or 0) / 2**20:.0f} MiB",
            _setting(one),
        ]
        table.add_row(*map(Text, cells), *names[number : number + 1])
    return table


def _likeness(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} dB" if metric == "psnr" else f"{metric} {value:.3f}"


def _setting(choice: Choice) -> str:
    """Return the parts of a setting in one line."""
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in choice.parts.items())


def _result(record: TuningRecord, path: Path) -> dict[str, Any]:
    """Return what was found as plain values."""
    return {
        "file": str(path),
        "baseline": record.baseline,
        "profiles": {name: one.to_dict() for name, one in record.profiles.items()},
        "front": [one.to_dict() for one in record.front],
        "solvers": record.solvers,
        "left_out": record.left_out,
    }


def progress_line(progress: Progress) -> dict[str, Any]:
    """Return a moment of a tuning as plain values."""
    values = {name: getattr(progress, name) for name in ("phase", "done", "total", "seconds_left", "text")}
    return {"event": "progress", **values, "front": [one.to_dict() for one in progress.front]}


def print_line(values: Mapping[str, Any]) -> None:
    """Print a JSON object in one line, at once."""
    typer.echo(json.dumps(values))
    sys.stdout.flush()


def _show(record: TuningRecord, path: Path, json_output: bool) -> None:
    """Print what was found."""
    from rich.console import Console

    console = Console()
    if json_output:
        console.print_json(json.dumps(_result(record, path)))
        return
    _show_tables(record, console)
    console.print(f"{path}: use it by speed_up(pipe, profile={str(path)!r})", markup=False, highlight=False)


def _check_found(record: TuningRecord, goals: Mapping[str, Goal]) -> None:
    """Refuse to end well without a setting.

    Raises:
        ValueError: no setting reaches the first goal.
    """
    first = next(iter(goals))
    if first not in record.profiles:
        raise ValueError(
            f"no setting that was verified in the time reaches {goals[first].text()}; ask for less, or give more "
            "--minutes (the file keeps what was measured)"
        )


def _show_tables(record: TuningRecord, console: Console) -> None:
    """Print the settings of the goals, the front, and what else is worth knowing."""
    from pipelines.tuning.profiles import Found
    from pipelines.tuning.reports import notes_on

    plain = record.baseline
    console.print(f"plain request: {plain['wall']:.2f} s ({plain['process']:.2f} s of processor time), "
                  f"{plain['network_share']:.0%} of it in the network", highlight=False)  # fmt: skip
    choices = list(record.profiles.values())
    if choices:
        console.print("settings for goals:")
        console.print(_table(choices, list(record.profiles)))
        for note in notes_on(Found(choices[0], "", record), {}):
            console.print(f"  {note}", markup=False, highlight=False)
    console.print("settings that no other dominates:")
    console.print(_table(record.front))
    for name, reason in record.left_out.items():
        console.print(f"  {name}: {reason}", markup=False, highlight=False)
