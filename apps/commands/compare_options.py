"""The command `tessera compare`: its own parameters, and the options of requests that all of its settings share.

It only parses, as `apps.commands.generate_options` does, which says how options become parameters.
"""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.commands.generate_options import PANELS, command_of
from apps.commands.given_options import DERIVED
from apps.commands.shared_options import BASE_HELP, Device, Json, ModelName, Offload, Precision
from apps.service.panels import COUNT, EDITING, MEASURED, OUTPUT, PROMPT

LEFT_OUT = ("num", "batch_size", "last_image", "mask", "video")
"""Options that a comparison has no use for: it generates one image or clip of each setting."""
ORDER = (*PANELS[:1], MEASURED, *PANELS[1:])
"""Panels of the help, in order."""


def compare(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="Prompt; a class name or number for models of classes.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--settings",
            metavar="FILE.json|'NAME=VALUE ...'",
            help="One setting: options such as 'steps=10 cache=taylorseer', JSON of an acceleration or a file of it; "
            "'NAME: ...' names it. Give it several times; the first is the reference.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A,B,...",
            help="A grid: an option and its values, combined with those of further --vary and with each --settings.",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    runs: Annotated[
        int,
        typer.Option(
            min=1,
            max=5,
            help="Runs of each setting: the first also prepares, the later ones are timed.",
            rich_help_panel=MEASURED,
        ),
    ] = 3,
    base: Annotated[str | None, typer.Option(help=BASE_HELP, rich_help_panel=PROMPT)] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels: 128, or WIDTHxHEIGHT such as 192x128.", rich_help_panel=COUNT)
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Start from this image; a clip begins with it.", rich_help_panel=EDITING
        ),
    ] = None,
    device: Device = "auto",
    dtype: Precision = "auto",
    offload: Offload = "none",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="HTML file to write, which needs no network; a PNG sheet goes beside it.",
            show_default="comparison.html, or the next name that is free",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json_output: Json = False,
    **derived: Any,
) -> None:
    """Generate one prompt with several settings: images side by side, differences, time, memory, PSNR and SSIM."""
    from apps.commands.compare import run
    from apps.commands.generate import DeviceOptions
    from apps.commands.given_options import make_options

    options = make_options(
        prompt=prompt,
        model=model,
        size=size,
        image=image,
        dtype=None if dtype == "auto" else dtype,
        **derived,
    )
    device_options = DeviceOptions(device=device, dtype=dtype, offload=offload, base=base)
    run(options, settings or [], vary or [], runs, output, device_options, json_output)


@functools.cache
def build_command() -> Any:
    """Return the command, with all of its parameters."""
    return command_of(compare, (name for name in DERIVED if name not in LEFT_OUT), ORDER)
