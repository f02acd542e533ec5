"""`tessera models`: the models that a studio started here would offer, what each needs, and the list of own ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.commands.shared_options import Device, Json, ModelsFolder, Precision
from apps.service.panels import OUTPUT

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
def add(
    source: Annotated[str, typer.Argument(help="Folder, .safetensors or .gguf file, or hub id.")],
    folder: ModelsFolder = None,
    output: Beside = Path("outputs"),
) -> None:
    """Add a model to the list; a hub id is pinned to the commit that it has now."""
    from apps.service.own_models import add_source

    typer.echo(add_source(_folder(folder, output), source))


@models.command()
def remove(
    source: Annotated[str, typer.Argument(help="As `tessera models add` printed it.")],
    folder: ModelsFolder = None,
    output: Beside = Path("outputs"),
) -> None:
    """Take a model off the list; its files stay."""
    from apps.service.own_models import remove_source

    remove_source(_folder(folder, output), source)


def _folder(folder: Path | None, output: Path) -> Path:
    from apps.service.own_models import models_folder

    return models_folder(output) if folder is None else folder


def _rows(own: Path, device: str, dtype: str) -> dict[str, Any]:
    """Return what each model needs, by name."""
    from apps.service.devices import resolve_device, resolve_dtype
    from apps.service.model_facts import facts_of
    from apps.service.model_pool import name_models
    from apps.service.own_models import own_models
    from pipelines import builtin_models

    where = resolve_device(device)
    as_what = str(resolve_dtype(dtype, where)).removeprefix("torch.")
    named = name_models(builtin_models())
    named |= own_models(own, named)
    return {key: facts_of(source, where, as_what) for key, source in named.items()}
