"""`tessera attention`: its commands and their options; they import what they run."""

from typing import Annotated

import typer

from apps.commands.shared_options import Json
from apps.service.panels import MEASURED

attention = typer.Typer(help="Look at patterns of sparse attention.", no_args_is_help=True, rich_markup_mode="rich")


@attention.command()
def simulate(
    pattern: Annotated[str, typer.Argument(help="Name of the pattern; docs/attention.md describes all.")],
    grid: Annotated[
        str,
        typer.Option(
            metavar="[T]xHxW", help="Visual tokens: frames, rows, columns; HxW for images.", rich_help_panel=MEASURED
        ),
    ],
    params: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A parameter of the pattern, such as window=18,24,24; may be given several times.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    text: Annotated[int, typer.Option(min=0, help="Text tokens in the same sequence.", rich_help_panel=MEASURED)] = 0,
    json_output: Json = False,
) -> None:
    """Say how much faster a static pattern can make attention at most, by its pairs and by its blocks."""
    from apps.commands.attention_simulate import run

    run(pattern, grid=grid, params=params or [], text=text, json_output=json_output)
