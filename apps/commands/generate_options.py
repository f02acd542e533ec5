"""The command `tessera generate`: its own parameters, and those that follow from the options of requests.

Like `apps.cli` it only parses; `apps.cli` imports it when the command runs or its help is asked for, because the
options bring pydantic along.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from apps.commands.given_options import DERIVED, command_type
from apps.commands.shared_options import BASE_HELP, Device, Json, Offload, Precision
from apps.service.declared import DeclaredOption
from apps.service.panels import COUNT, EDITING, FILES, OUTPUT, PROMPT, SAMPLING, SCALES, SPEED

PANELS = ("", PROMPT, FILES, COUNT, SAMPLING, SCALES, EDITING, SPEED, OUTPUT)
"""Panels of the help, in order; the argument stands in none."""
MOST_SHOWN = 10_000
"""Bounds beyond this are no help."""


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Prompt; a class name or number for models of classes.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Built-in name, folder, file, hub id or OWNER/NAME@COMMIT.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP, rich_help_panel=PROMPT)] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Take the settings of this image, clip or JSON file.",
            rich_help_panel=FILES,
        ),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSONL (or text) file with an image a line; goes on where it was.",
            rich_help_panel=FILES,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels: 128, or WIDTHxHEIGHT such as 192x128.",
            rich_help_panel=COUNT,
        ),
    ] = None,
    wildcards: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of text files, of which __name__ in a prompt takes a line.",
            show_default="wildcards beside the output, or in outputs",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            help="Put this LoRA (safetensors, or a folder of PEFT's) on the model. May be repeated.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    lora_scale: Annotated[
        list[float] | None,
        typer.Option(
            min=-4.0,
            max=4.0,
            help="With --lora: how much of it; 1 is as trained. Once for all, or once for each.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Start from this image; a clip begins with it.", rich_help_panel=EDITING
        ),
    ] = None,
    last_image: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A clip ends with this image.", rich_help_panel=EDITING),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Complete this clip (MP4, WebM, GIF): see --video-mask; with more --frames than it has, go on.",
            rich_help_panel=EDITING,
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="With --image: change only where it is white.", rich_help_panel=EDITING
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
            help="PNG, WebP, MP4 or GIF file to write; a file that exists is replaced. A folder with --batch.",
            show_default="tessera.png, or the next name that is free",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    keep_settings: Annotated[
        bool,
        typer.Option(
            "--keep-settings/--no-settings",
            help="Write what reproduces an image into its file.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    sidecar: Annotated[
        bool,
        typer.Option(
            "--sidecar",
            help="Write it into a JSON file beside the image.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    audio: Annotated[
        str | None,
        typer.Option(
            help="Sound of the clip: an audio file, or 'silent'; what the model itself makes is replaced.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json_output: Json = False,
    **derived: Any,
) -> None:
    """Generate an image from a prompt, repeat one from its settings, or work through a file of prompts."""
    from apps.commands.generate import DeviceOptions, run
    from apps.commands.given_options import make_options
    from apps.commands.own_files import usual_wildcards

    options = make_options(
        prompt=prompt,
        model=model,
        size=size,
        image=image,
        mask=mask,
        last_image=last_image,
        video=video,
        lora=lora or None,
        lora_scale=lora_scale or None,
        dtype=None if dtype == "auto" else dtype,
        **derived,
    )
    beside = None if output is None else output if batch is not None else output.parent
    lists = wildcards or usual_wildcards(beside)
    device_options = DeviceOptions(device=device, dtype=dtype, offload=offload, base=base, wildcards=lists)
    if prompt is None and settings is None and batch is None:
        raise typer.BadParameter("There is nothing to generate: give a prompt, --settings or --batch.")
    if batch is None:
        run(options, output, device_options, settings, json_output, keep_settings, sidecar, audio)
        return
    if prompt is not None or settings is not None:
        raise typer.BadParameter("--batch has its prompts in the file; leave out the prompt and --settings.")
    if audio is not None:
        raise typer.BadParameter("--audio is for one clip; leave out --batch.")
    from apps.commands.batch import run_batch

    folder = Path("outputs") / batch.stem if output is None else output
    run_batch(batch, folder, options, device_options, json_output, keep_settings, sidecar)


def command_of(function: Callable[..., None], derived: Iterable[str], panels: Sequence[str]) -> Any:
    """Return the command of a function that takes derived options as keyword arguments.

    Args:
        function: with parameters of its own, as Typer reads them, and `**derived`.
        derived: names of the options that become parameters too.
        panels: of the help, in order.
    """
    own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
    parameters = [*own, *map(derived_parameter, derived)]
    ordered = sorted(parameters, key=lambda one: panels.index(panel_of(one)))
    function.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command(name=function.__name__, context_settings={"help_option_names": ["-h", "--help"]})(function)
    return typer.main.get_command(app)


def derived_parameter(name: str) -> inspect.Parameter:
    """Return the parameter of a derived option; as long as it isn't given it is None."""
    one = DERIVED[name]
    flags = [f"--{name.replace('_', '-')}"]
    if one.type is bool:
        flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
    info = typer.Option(*flags, help=one.option.help + _accepted(one), rich_help_panel=one.option.panel)
    annotation = Annotated[command_type(one) | None, info]
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=annotation)


def _accepted(one: DeclaredOption) -> str:
    """Say what an option takes; requests check it, so that it is refused with one message everywhere."""
    if one.choices and one.choices[0] not in one.option.help:
        return f" ({', '.join(one.choices)})"
    if one.high is None or one.high > MOST_SHOWN:
        return ""
    return f" (up to {one.high:g})" if one.low is None else f" ({one.low:g} to {one.high:g})"


def panel_of(one: inspect.Parameter) -> str:
    """Return the panel of `--help` that a parameter stands in."""
    found = (getattr(part, "rich_help_panel", None) for part in getattr(one.annotation, "__metadata__", ()))
    return next(filter(None, found), "")


@functools.cache
def build_command() -> Any:
    """Return the command, with all of its parameters."""
    return command_of(generate, DERIVED, PANELS)
