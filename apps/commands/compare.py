"""`tessera compare`: one prompt and seed with several settings, as a page of its own and as one image."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from apps.commands.generate import DEFAULT_MODEL, DeviceOptions, error_of, make_request
from apps.commands.given_options import GenerateOptions
from apps.commands.options import check_options
from apps.service.comparison import Comparison, Progress, ReferenceFailedError, Result, compare
from apps.service.comparison_page import TEXTS, document, numbers
from apps.service.comparison_settings import plan, read_settings, read_variation
from apps.service.comparison_sheet import save_contact_sheet
from apps.service.compute_profiles import check_request
from apps.service.content_credentials import check_signing
from apps.service.events import ModelLoading, Step
from apps.service.logs import no_repetition
from apps.service.model_pool import check_sources
from apps.service.usage import UsageError, checking
from apps.service.writable import check_writable

DEFAULT_OUTPUT = Path("comparison.html")
MOST_NAMES = 10_000
COLUMNS = ("setting", "first", "later", "faster", "memory", "psnr", "ssim")


def run(
    options: GenerateOptions,
    settings: Sequence[str],
    vary: Sequence[str] = (),
    runs: int = 3,
    output: Path | None = None,
    device_options: DeviceOptions | None = None,
    json_output: bool = False,
) -> None:
    """Compare settings, and write what was found.

    Args:
        options: of all settings.
        settings: see `apps.service.comparison_settings.read_setting`; the first one is the reference.
        vary: options and their values, `NAME=A,B`; every combination of them is a setting.
        runs: of each setting.
        output: HTML file; a PNG of the same name goes beside it. None is comparison.html, or the next name that is
            free.
        device_options: where to compute.
        json_output: print one JSON object instead of a table and a progress bar.

    Raises:
        UsageError: a setting is not understood or can't be had, or a file can't be written; as far as possible before
            the model is loaded.
        OSError: the model can't be read, or a file can't be written.
        KeyboardInterrupt: Ctrl-C; nothing is written.
    """
    console, device_options = Console(stderr=True, quiet=json_output), device_options or DeviceOptions()
    with checking(ValueError, OSError):
        compared = read_settings(settings, [read_variation(text) for text in vary])
        page, sheet = _outputs(output)
        source = options.model or DEFAULT_MODEL
        check_sources([source], device_options.base)
        rehearsed = check_options(options, source)
        if rehearsed is not None:
            plan(rehearsed, compared)
        opened = device_options.for_quantization(options.value("quantization")).engine(source)
    with no_repetition(), closing(opened) as engine:
        with checking(ValueError, FileNotFoundError):
            request = make_request(options, engine)
            for one in plan(request, compared):
                check_request(one, engine.devices)
        try:
            found = _follow(compare(engine, request, compared, runs=runs), console)
        except ReferenceFailedError as error:
            raise error_of(error.failed) from error
    _write(found, page, sheet)
    _report(found, page, sheet, json_output)


def _outputs(output: Path | None) -> tuple[Path, Path]:
    """Name the files, and make sure that they can be written.

    Raises:
        UsageError: no HTML name, a file that can't be written, or a signature that is configured and can't be made.
    """
    page = _free() if output is None else output
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{str(page)!r}: a comparison is written as HTML, with a PNG beside it; use '.html'.")
    sheet = page.with_suffix(".png")
    for path in (page, sheet):
        check_writable(path)
    check_signing()
    page.parent.mkdir(parents=True, exist_ok=True)
    return page, sheet


def _free() -> Path:
    """Return the default name, or the next one that no file has.

    Raises:
        FileExistsError: all names are taken.
    """
    for i in range(MOST_NAMES):
        page = DEFAULT_OUTPUT if i == 0 else DEFAULT_OUTPUT.with_stem(f"{DEFAULT_OUTPUT.stem}-{i}")
        if not any(os.path.lexists(path) for path in (page, page.with_suffix(".png"))):
            return page
    raise FileExistsError(f"{DEFAULT_OUTPUT} and {MOST_NAMES - 1} names like it are taken; name a file with -o.")


def _follow(events: Generator[Progress | Comparison], console: Console) -> Comparison:
    """Draw a progress bar, and return the comparison."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
    with closing(events), bar:
        task = bar.add_task("starting", total=1)
        for event in events:
            if isinstance(event, Comparison):
                return event
            bar.update(task, description=escape(describe(event)), completed=event.share)
    raise RuntimeError("The comparison has ended without a result.")


def describe(progress: Progress) -> str:
    """Say in one line how far a comparison is."""
    event = progress.event
    which = f"{progress.place + 1} of {progress.count}, {progress.label}, run {progress.run} of {progress.runs}"
    if isinstance(event, ModelLoading):
        return f"{which}: loading {event.model}"
    return f"{which}: step {event.step} of {event.steps}" if isinstance(event, Step) else which


def _write(found: Comparison, page: Path, sheet: Path) -> None:
    partial = page.with_name(f".{uuid.uuid4().hex}.part")
    try:
        partial.write_text(document(found), encoding="utf-8")
        partial.replace(page)
    finally:
        partial.unlink(missing_ok=True)
    save_contact_sheet(found, sheet)


def _report(found: Comparison, page: Path, sheet: Path, json_output: bool) -> None:
    console = Console(soft_wrap=True)
    if json_output:
        rows = [_row(place, one, found) for place, one in enumerate(found.results)]
        values = {"page": str(page), "sheet": str(sheet), "prompt": found.prompt, "seed": found.seed,
                  "runs": found.runs, "settings": rows}  # fmt: skip
        console.print_json(json.dumps(values))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for key in COLUMNS:
        table.add_column(TEXTS[key], justify="left" if key == "setting" else "right")
    for place, one in enumerate(found.results):
        star = "*" if place in found.front else ""
        table.add_row(star, escape(f"{place + 1}. {one.setting.label}"), *numbers(found, one))
    console.print(table)
    for place, one in enumerate(found.results):
        said = f"failed: {one.problem}" if one.problem else one.report
        if said:
            console.print(f"[dim]{place + 1}. {escape(said)}[/dim]", highlight=False)
    console.print("[dim]* no other setting is both nearer and faster[/dim]", highlight=False)
    console.print(f"{page}, {sheet}", highlight=False, markup=False)


def _row(place: int, one: Result, found: Comparison) -> dict[str, Any]:
    def number(value: float | None) -> float | str | None:  # JSON has neither infinity nor NaN
        return None if value is None or math.isnan(value) else "inf" if math.isinf(value) else round(value, 6)

    return {
        "label": one.setting.label,
        "first_seconds": number(one.first_seconds),
        "seconds": number(one.seconds),
        "memory": one.memory,
        "psnr": number(one.psnr),
        "ssim": number(one.ssim),
        "on_front": place in found.front,
        "report": one.report,
        "reports": [part.to_dict() for part in one.reports],
        "notes": list(one.notes),
        "problem": one.problem or None,
        "settings": None if one.settings is None else one.settings.model_dump(mode="json"),
    }
