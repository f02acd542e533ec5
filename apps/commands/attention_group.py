"""`tessera attention`: its commands and their options; they import what they run."""

from pathlib import Path
from typing import Annotated

import typer

from apps.commands.shared_options import Device, Json, ModelName, Precision, Steps
from apps.service.panels import MEASURED

attention = typer.Typer(
    help="Sparse attention: what patterns can save, plans for a model, costs on this machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


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


@attention.command()
def calibrate(
    model: ModelName = "stickers",
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to measure on; one to four are enough.")] = None,
    error: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1.0, help="Most relative distance to dense attention, or 0.05.", rich_help_panel=MEASURED
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(min=0.02, max=1.0, help="Instead: most of the pairs to compute.", rich_help_panel=MEASURED),
    ] = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(min=5.0, max=100.0, help="Least PSNR to images of dense attention, dB.", rich_help_panel=MEASURED),
    ] = None,
    dense_first: Annotated[
        float,
        typer.Option(
            min=0.0, help="Steps at the beginning that stay dense: a number, or a fraction.", rich_help_panel=MEASURED
        ),
    ] = 0.2,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="File to write; the model's folder if absent.")
    ] = None,
    steps: Steps = None,
    device: Device = "auto",
    dtype: Precision = "auto",
) -> None:
    """Find a plan of sparse attention for a model, for --attention-pattern plan."""
    from apps.commands.attention_calibrate import run

    run(
        model,
        prompts=prompt or (),
        error=error,
        density=density,
        min_psnr=min_psnr,
        dense_first=dense_first,
        steps=steps,
        output=output,
        device=device,
        dtype=dtype,
    )


@attention.command()
def costs(
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the fastest counts.", rich_help_panel=MEASURED)] = 5,
    json_output: Json = False,
) -> None:
    """Measure what attention costs on this CPU, in some seconds, and keep it: plans compute sparsely where it pays."""
    from apps.commands.attention_costs import run

    run(repeats=repeats, json_output=json_output)
