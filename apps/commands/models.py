"""`tessera models`: the models that a studio started here would offer, what each needs, and the list of own ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.commands.shared_options import Device, Json, ModelsFolder, Precision
from apps.service.panels import OUTPUT

LOOK_SECONDS = 0.2
"""Between two looks at a download."""
models = typer.Typer(no_args_is_help=True, help="List, add and remove the models of your own that the studio offers.")
Beside = Annotated[
    Path,
    typer.Option(
        "--output", file_okay=False, help="Output folder of the studio, beside which the models lie.",
        rich_help_panel=OUTPUT,
    ),
]  # fmt: skip


@models.command("list")
def list_models(
    folder: ModelsFolder = None,
    output: Beside = Path("outputs"),
    device: Device = "auto",
    dtype: Precision = "auto",
    json_output: Json = False,
) -> None:
    """List built-in and own models with their size, memory beside what is free, and licence."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from apps.service.model_folder import scan
    from apps.service.own_models import own_loras
    from pipelines.loading.memory import gib

    own = _folder(folder, output)
    rows, broken = _rows(own, device, dtype), [one for one in scan(own) if not one.is_usable]
    loras = own_loras(own)
    if json_output:
        found = {
            "folder": str(own),
            "models": [{"id": key, **facts.to_dict()} for key, facts in rows.items()],
            "loras": sorted(loras),
            "unusable": {one.name: one.problem for one in broken},
        }
        Console(soft_wrap=True).print_json(json.dumps(found))
        return
    table = Table("model", "kind", "on disk", "parameters", "memory", "licence")
    for key, facts in rows.items():
        memory = "" if facts.verdict == "unknown" else f"{facts.verdict.replace('_', ' ')}: {gib(facts.memory)}"
        cells = [key, facts.kind, gib(facts.nbytes), f"{facts.parameters / 1e6:.1f} M", facts.problem or memory]
        table.add_row(*map(Text, [*cells, facts.licence]))
    console = Console()
    console.print(table)
    if loras:
        console.print(f"LoRAs: {', '.join(sorted(loras))}", markup=False, highlight=False)
    for one in broken:
        console.print(f"not usable: {one.name}: {one.problem}", markup=False, highlight=False)


@models.command()
def info(
    name: Annotated[str, typer.Argument(help="Name that `tessera models list` shows, or a folder or file.")],
    folder: ModelsFolder = None,
    output: Beside = Path("outputs"),
    device: Device = "auto",
    dtype: Precision = "auto",
    json_output: Json = False,
) -> None:
    """Say what one model needs before it is loaded, and what to do where it doesn't fit."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from apps.service.model_download import downloaded_folder, pinned
    from apps.service.model_facts import facts_of
    from apps.service.model_pool import abilities_on_disk, check_sources
    from pipelines.loading.memory import gib

    own = _folder(folder, output)
    source = _sources(own).get(name, name)
    check_sources([source])
    where, as_what = _setup(device, dtype)
    facts, able = facts_of(source, where, as_what), abilities_on_disk(source)
    place = downloaded_folder(source, own)
    found = None if place is None else pinned(place)
    origin = "" if found is None else "@".join(found)
    if json_output:
        values = {"id": name, "source": source, "origin": origin, "tasks": list(able.tasks), **facts.to_dict()}
        Console(soft_wrap=True).print_json(json.dumps(values))
        return
    memory = "" if facts.verdict == "unknown" else f"{gib(facts.memory)} of {gib(facts.free)} free on {where}"
    lines = {
        "kind": facts.kind, "source": source, "origin": origin, "tasks": ", ".join(able.tasks),
        "parameters": f"{facts.parameters / 1e6:.1f} M", "on disk": f"{gib(facts.nbytes)} {facts.dtype}",
        "memory": memory, "verdict": facts.verdict.replace("_", " "), "remedy": facts.remedy,
        "licence": facts.licence, "problem": facts.problem,
    }  # fmt: skip
    table = Table(title=Text(name), show_header=False)
    for label, value in lines.items():
        if value:
            table.add_row(label, Text(value))
    Console().print(table)


@models.command()
def add(
    source: Annotated[str, typer.Argument(help="Folder, .safetensors or .gguf file, or hub id, OWNER/NAME@COMMIT.")],
    folder: ModelsFolder = None,
    output: Beside = Path("outputs"),
    json_output: Json = False,
) -> None:
    """Add a model by path, or fetch one from the Hub into the folder, at the commit that it has now."""
    from apps.service.own_models import add_source, is_hub_id

    own = _folder(folder, output)
    if is_hub_id(source):
        _fetch(own, source, json_output)
        return
    added = add_source(own, source)
    typer.echo(json.dumps({"source": added}) if json_output else added)


@models.command()
def remove(
    source: Annotated[str, typer.Argument(help="Name that `tessera models list` shows, or what `add` printed.")],
    folder: ModelsFolder = None,
    output: Beside = Path("outputs"),
    json_output: Json = False,
) -> None:
    """Take a model off the list; only files that `add` has fetched are removed."""
    import shutil

    from apps.service.model_download import downloaded_folder
    from apps.service.own_models import own_loras, remove_source

    own = _folder(folder, output)
    named = {name: str(path) for name, path in own_loras(own).items()} | _sources(own)
    found = named.get(source, source)
    place = downloaded_folder(found, own)
    if place is None:
        remove_source(own, found, source)
    else:
        shutil.rmtree(place)
    if json_output:
        typer.echo(json.dumps({"removed": found, "files_removed": place is not None}))


def _fetch(own: Path, source: str, json_output: bool) -> None:
    """Fetch a repository and show how it goes; Ctrl-C ends it and removes what is there of it.

    Raises:
        OSError: it failed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from apps.service.model_download import Downloads
    from apps.service.usage import checking
    from pipelines.loading.hub_id import split_revision

    with checking():
        repository, revision = split_revision(source.strip())
    downloads = Downloads(own, lambda: [])
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    try:
        started = downloads.start(repository, revision)
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(repository, total=started.nbytes)
            while not downloads.wait(LOOK_SECONDS):
                last = downloads.last
                bar.update(task, completed=started.fetched if last is None else last.fetched)
    finally:
        downloads.close()
    end = downloads.last
    if end is None or end.state != "done":
        raise OSError(f"{repository} could not be fetched: {end.reason if end else 'it was not begun'}")
    pinned = f"{end.repository}@{end.commit}"
    typer.echo(json.dumps({"source": pinned, "bytes": end.nbytes}) if json_output else pinned)


def _folder(folder: Path | None, output: Path) -> Path:
    from apps.service.own_models import models_folder

    return models_folder(output) if folder is None else folder


def _sources(own: Path) -> dict[str, str]:
    """Return built-in and own models: name -> source."""
    from apps.service.model_pool import name_models
    from apps.service.own_models import own_models
    from pipelines import builtin_models

    named = name_models(builtin_models())
    return named | own_models(own, named)


def _setup(device: str, dtype: str) -> tuple[str, str]:
    """Return the device and the number format that models would be loaded for."""
    from apps.service.devices import resolve_device, resolve_dtype

    where = resolve_device(device)
    return where, str(resolve_dtype(dtype, where)).removeprefix("torch.")


def _rows(own: Path, device: str, dtype: str) -> dict[str, Any]:
    """Return what each model needs, by name."""
    from apps.service.model_facts import facts_of

    where, as_what = _setup(device, dtype)
    return {key: facts_of(source, where, as_what) for key, source in _sources(own).items()}
